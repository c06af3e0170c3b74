"""Adapters that are merged into a student's weights: alone, one upon the other, of another model."""

import pytest
import torch

from lark.student.model_parts import compute_hidden_states
from lark.student.student import save_student

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture
def adapter(make_student, tmp_path):
    """A folder with an adapter that changes the student, and its model with the adapter apart."""

    def make(name, student, seed=0):
        torch.manual_seed(seed)
        model = student.load_trainable(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        save_student(model, student.load_chat(), tmp_path / name)
        return str(tmp_path / name), model.eval()

    return make


def test_an_adapter_is_merged_into_the_weights(make_student, adapter):
    ids = torch.arange(20)[None]
    plain = make_student(lora=LORA)
    folder, apart = adapter("one", plain)
    student = make_student(adapter=folder)
    merged = student.load_model(torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters()) and not merged.training
    with torch.no_grad():
        own, expected = (compute_hidden_states(model, ids, None) for model in (merged, apart))
        untrained = compute_hidden_states(plain.load_model(torch.float32), ids, None)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert (own - untrained).abs().max() > 0.1
    assert student.identity() != plain.identity() == make_student().identity()
    assert student.identity()["weights"] == plain.identity()["weights"]

    # a second one, trained on top of the first
    upon = make_student(lora=LORA, adapter=folder)
    second, apart = adapter("two", upon, seed=1)
    both = make_student(adapter=(folder, second)).load_model(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            compute_hidden_states(both, ids, None), compute_hidden_states(apart, ids, None), rtol=1e-4, atol=1e-4
        )


def test_beside_bfloat16_weights_a_small_adapter_is_kept_that_in_them_would_be_lost(make_student, tmp_path):
    ids = torch.arange(40)[None]
    plain = make_student(lora=LORA)
    model = plain.load_trainable(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(1e-3 * torch.randn_like(parameter).sign())
    save_student(model, plain.load_chat(), tmp_path / "small")
    student = make_student(adapter=str(tmp_path / "small"))

    def change(dtype, **merge):
        with torch.no_grad():
            before = compute_hidden_states(plain.load_model(dtype), ids, None).float()
            return (compute_hidden_states(student.load_model(dtype, **merge), ids, None).float() - before).flatten()

    exact = change(torch.float32)
    torch.testing.assert_close(change(torch.float32, merge=False), exact, rtol=1e-3, atol=1e-5)
    beside, inside = (change(torch.bfloat16, merge=merge) for merge in (False, True))
    likeness = [torch.cosine_similarity(one, exact, dim=0).item() for one in (beside, inside)]
    assert likeness[0] > likeness[1]


def test_adapters_that_are_none(make_student, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"model\.adapter=/nowhere holds no adapter_config\.json; set it"):
        make_student(adapter="/nowhere")
    folder, _ = adapter("other", make_student(lora=LORA))
    student = make_student(path="shipped:tiny", adapter=folder)
    with pytest.raises(ValueError, match=r"model\.adapter=.*model=small"):
        student.load_model(torch.float32)
