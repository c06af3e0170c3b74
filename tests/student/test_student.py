"""Loading a student, its head, LoRA, saving."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import LlamaConfig, LlamaForCausalLM

from lark.student.context_length import find_rope_border
from lark.student.model_parts import compute_hidden_states, get_base_model, get_head
from lark.student.student import save_student

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_is_to_be_trained_is_in_train_mode(make_student, lora):
    model = make_student(lora=lora).load_trainable(torch.float32)
    assert all(module.training for module in model.modules())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if lora is None or "lora_" in name}


def test_dtype_is_that_of_the_weights_and_not_of_ropes_frequencies(make_student):
    model = make_student().load_model(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = [b for name, b in model.named_buffers() if "inv_freq" in name]
    assert frequencies and {b.dtype for b in frequencies} == {torch.float32}
    assert not model.training


def test_auto_dtype_follows_the_device(make_student):
    assert make_student().resolve_dtype(torch.device("cpu")) == torch.float32
    assert make_student().resolve_dtype(torch.device("cuda")) == torch.bfloat16
    assert make_student(dtype="float16").resolve_dtype(torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("name", ["tiny", "tiny_b"])
def test_the_shipped_students_load_and_head_and_hidden_states_give_their_logits(make_student, name):
    student = make_student(path=f"shipped:{name}")
    model = student.load_model(torch.float32)
    row = student.load_chat().encode([[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]])[0]
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        logits = get_head(model).compute_logits(compute_hidden_states(model, ids, None))
        torch.testing.assert_close(logits, model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_saved_and_loaded_again_it_is_the_same_student(make_student, lora, tmp_path):
    student = make_student(lora=lora)
    model = student.load_trainable(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    chat = student.load_chat()
    for _ in range(2):  # the second time it replaces the first
        save_student(model, chat, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert (tmp_path / "checkpoint" / "adapter_model.safetensors").exists() == (lora is not None)
    ids = torch.arange(10)[None]
    loaded = student.load_trained(tmp_path / "checkpoint", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            compute_hidden_states(loaded.eval(), ids, None),
            compute_hidden_states(model.eval(), ids, None),
            rtol=0,
            atol=0,
        )
    assert (tmp_path / "checkpoint" / "chat_template.jinja").read_text() == chat.template


def test_identity_is_the_content_of_the_weights(make_student, student_folder, tmp_path):
    copy = shutil.copytree(student_folder, tmp_path / "copy")
    assert make_student(path=str(copy)).identity() == make_student().identity()
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert make_student(path=str(copy)).identity() != make_student().identity()


def test_identity_of_a_hub_student_is_the_commit_its_branch_stands_for(make_student):
    repository = Path(HF_HUB_CACHE) / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):  # the branch moves
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        student = make_student(path=None, id="org/name", revision="main")
        assert student.identity() == {"id": "org/name", "revision": commit}
    with pytest.raises(ValueError, match="org/other could be loaded neither"):
        make_student(path=None, id="org/other", revision="main").identity()


def test_lora_on_the_head_is_refused(make_student):
    student = make_student(lora={"r": 2, "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match="modules_to_save"):
        student.load_trainable(torch.float32)


def test_a_head_that_does_more_than_we_reproduce_is_refused(make_student, monkeypatch):
    student = make_student()
    student.load_model(torch.float32)

    def halved(self: Any, **inputs: Any):
        return SimpleNamespace(logits=forward(self, **inputs).logits * 0.5)

    from transformers import Qwen3ForCausalLM

    forward: Any = Qwen3ForCausalLM.forward
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", halved)
    with pytest.raises(ValueError, match="model=small: qwen3 does more to its logits"):
        student.load_model(torch.float32)


def test_untied_head(make_student, student_folder, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = make_student(path=str(tmp_path)).load_model(torch.float32)
    assert get_head(model).weight_VD is get_base_model(model).lm_head.weight


def broken(kind, student_folder, folder):
    shutil.copytree(student_folder, folder, dirs_exist_ok=True)
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "broken weights":
        (folder / "model.safetensors").write_bytes(b"x")
    elif kind == "no GGUF":
        (folder / "model.gguf").write_bytes(b"not it")
        return folder / "model.gguf"
    return folder


@pytest.mark.parametrize("kind", ["empty folder", "no tokenizer", "broken weights", "no GGUF"])
def test_a_folder_that_cannot_be_used_is_one_sentence(kind, make_student, student_folder, tmp_path):
    path = broken(kind, student_folder, tmp_path / "student")
    student = make_student(path=str(path))
    with pytest.raises(ValueError, match=r"^model\.path=.* holds no student .*; set it to a folder with") as caught:
        student.load_tokenizer()
        student.load_model(torch.float32)
    assert "\n" not in str(caught.value)


def test_no_hub_and_no_copy_is_one_sentence(make_student):
    student = make_student(path=None, id="nobody/none", revision="main")
    for load in (student.load_tokenizer, lambda: student.load_model(torch.float32)):
        with pytest.raises(ValueError, match=r"^model=small: nobody/none could be loaded neither .*; set model\.path="):
            load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp8"}, r"model\.dtype='fp8'"),
        ({"path": None}, r"model\.path and model\.id are both null"),
        ({"path": "/no/such"}, r"model\.path=/no/such does not exist"),
    ],
)
def test_a_student_says_which_setting_is_wrong(make_student, settings, message):
    with pytest.raises(ValueError, match=message):
        make_student(**settings)


@pytest.mark.parametrize(
    ("rope", "border"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, math.inf),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, math.inf),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 24),
    ],
)
def test_positions_that_depend_on_the_longest_row(rope, border):
    """From the border on, a row's hidden states change with what it is computed beside; up to it, they do not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    assert find_rope_border(model) == border
    short, long = torch.randint(1, 64, (1, 20)), torch.randint(1, 64, (1, 40))
    together = torch.cat([torch.nn.functional.pad(short, (0, 20)), long])
    with torch.inference_mode():
        alone = compute_hidden_states(model, short, None)
        beside = compute_hidden_states(model, together, None).view(2, 40, -1)[0, :20]
    assert torch.allclose(alone, beside, atol=1e-5) == (border == math.inf)
