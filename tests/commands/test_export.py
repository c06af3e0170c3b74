"""Exporting a trained arm: what comes out is the student that was trained, and other tools load and stop it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from trained_arm import EVALUATION, LORA, write_arm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor

from lark.export import export, main
from lark.student.model_parts import get_base_model
from lark.student.student import save_student

IDS = torch.arange(40)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def assert_same(model, other):
    expected = logits(other)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def plain(folder, **how):
    """As anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@pytest.fixture
def lora_arm(make_student, tmp_path):
    return tmp_path / "arm", write_arm(tmp_path / "arm", make_student(lora=LORA))


@pytest.fixture
def full_arm(make_student, tmp_path):
    return tmp_path / "arm", write_arm(tmp_path / "arm", make_student())


# --- the checkpoint


def test_peft_alone_loads_an_adapter(lora_arm, student_folder):
    arm, trained = lora_arm
    loaded = AutoPeftModelForCausalLM.from_pretrained(arm / "checkpoint")
    assert loaded.peft_config["default"].base_model_name_or_path == str(student_folder)
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=0)
    assert not (arm / "checkpoint" / "model.safetensors").exists()


def test_an_adapter_for_the_hub_names_id_and_commit(make_student, student_folder, tmp_path):
    commit = "c" * 40
    repository = Path(HF_HUB_CACHE) / "models--exported--base"
    shutil.copytree(student_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    student = make_student(path=None, id="exported/base", revision="main", lora=LORA)
    trained = write_arm(tmp_path / "arm", student)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "arm" / "checkpoint")
    config = loaded.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("exported/base", commit)
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=0)


class Forced(LogitsProcessor):
    """Makes a token the most likely one at the third step."""

    def __init__(self, token, start):
        self.token, self.third = token, start + 2

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.third:
            scores[:, self.token] = scores.max() + 1
        return scores


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>", "<end>"])
def test_it_stops_at_the_end_of_turn_and_at_the_tokenizers_end_token(lora_arm, tmp_path, merge, end):
    arm, _ = lora_arm
    export(arm, tmp_path / "out", merge=merge)
    model: Any = plain(tmp_path / "out") if merge else AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    if not merge:
        model.generation_config = GenerationConfig.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    token = tokenizer.convert_tokens_to_ids(end)
    forced = Forced(token, length)
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False, logits_processor=[forced])[0, length:]
    assert len(answer) == 3 and answer[-1] == token


def test_settings_of_generation_that_contradict_each_other_do_not_lose_a_student(make_student, tmp_path):
    student = make_student()
    model = student.load_model(torch.float32)
    model.generation_config.temperature = 0.5  # without do_sample: transformers refuses to save it
    save_student(model, student.load_chat(), tmp_path / "checkpoint")
    config = GenerationConfig.from_pretrained(tmp_path / "checkpoint")
    assert config.temperature is None and "<|im_end|>" in student.load_tokenizer().decode(config.eos_token_id)


def test_what_was_dequantised_is_saved_as_an_ordinary_model(make_student, tmp_path):
    student = make_student()
    model = student.load_model(torch.float32)
    quantized = SimpleNamespace(quant_method="gguf")  # what transformers leaves of a .gguf file
    model.config.quantization_config = quantized
    model.hf_quantizer = SimpleNamespace(quantization_config=quantized)
    save_student(model, student.load_chat(), tmp_path / "checkpoint")
    torch.testing.assert_close(logits(plain(tmp_path / "checkpoint")), logits(model), rtol=0, atol=0)


# --- the export


def test_merged_it_is_the_same_model(lora_arm, tmp_path):
    arm, trained = lora_arm
    export(arm, tmp_path / "out", merge=True, dtype="float32")
    merged = plain(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    assert_same(merged, trained)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert "then saved in float32" in (tmp_path / "out" / "README.md").read_text()


def test_merged_then_cast(lora_arm, tmp_path):
    arm, _ = lora_arm
    export(arm, tmp_path / "exact", merge=True, dtype="float32")
    export(arm, tmp_path / "cast", merge=True, dtype="bfloat16")
    exact, cast = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "cast"))
    assert exact.keys() == cast.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(torch.bfloat16), cast[name])
    assert plain(tmp_path / "cast", dtype="auto").dtype == torch.bfloat16


def test_merged_into_a_base_in_bfloat16_it_is_in_bfloat16(make_student, student_folder, tmp_path):
    plain(student_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    make_student().load_tokenizer().save_pretrained(tmp_path / "base")
    trained = write_arm(tmp_path / "arm", make_student(path=str(tmp_path / "base"), lora=LORA))
    export(tmp_path / "arm", tmp_path / "out", merge=True)
    merged = plain(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    whole = trained.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, whole[name].to(torch.bfloat16), rtol=0.01, atol=1e-6)


def test_a_head_that_was_trained_is_no_longer_tied_to_the_embeddings(make_student, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    student = make_student(lora=lora)
    assert student.load_model(torch.float32).config.tie_word_embeddings
    trained = write_arm(tmp_path / "arm", student)
    base: Any = get_base_model(trained)
    assert not torch.equal(base.get_output_embeddings().weight, base.get_input_embeddings().weight)
    export(tmp_path / "arm", tmp_path / "out", merge=True, dtype="float32")
    assert_same(plain(tmp_path / "out"), trained)


def test_a_row_that_head_and_embeddings_share_is_merged_into_both(make_student, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0]}}
    trained = write_arm(tmp_path / "arm", make_student(lora=lora))
    export(tmp_path / "arm", tmp_path / "out", merge=True, dtype="float32")
    assert_same(plain(tmp_path / "out"), trained)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        make_student(lora=lora | {"trainable_token_indices": {"lm_head": [0]}}).load_trainable(torch.float32)


def test_an_adapter_in_another_dtype(lora_arm, tmp_path):
    arm, _ = lora_arm
    export(arm, tmp_path / "out", dtype="bfloat16")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (arm / "checkpoint", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_all_parameters_trained(full_arm, tmp_path, dtype, caplog):
    arm, trained = full_arm
    (tmp_path / "out").mkdir()  # an empty folder will do
    export(arm, tmp_path / "out", merge=True, dtype=dtype)
    assert "nothing to merge" in caplog.text
    loaded = plain(tmp_path / "out", dtype="auto")
    assert loaded.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.dtype))


@pytest.mark.parametrize("merge", [False, True])
def test_tokenizer_template_and_card_come_along(lora_arm, tmp_path, make_student, merge):
    arm, _ = lora_arm
    (arm / "metrics.json").write_text(json.dumps(EVALUATION))
    export(arm, tmp_path / "out", merge=merge)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "What is 1 + 1?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == make_student().load_chat().encode_prompt(asked)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Evaluation" in text and ("merged into" in text) == merge
    left = {"arm", "out"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_runs_link_names_that_run(lora_arm, tmp_path):
    arm, _ = lora_arm
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "replay.yaml").touch()
    (tmp_path / "run" / "selector").symlink_to(arm)
    export(tmp_path / "run" / "selector", tmp_path / "out")
    assert f"--config-path {tmp_path / 'run'} " in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"is a run, not an arm; name .*run/selector$"):
        export(tmp_path / "run", tmp_path / "other")


# --- what can be wrong


def test_a_base_that_has_moved(make_student, student_folder, tmp_path):
    base = shutil.copytree(student_folder, tmp_path / "base")
    trained = write_arm(tmp_path / "arm", make_student(path=str(base), lora=LORA))
    base.rename(tmp_path / "moved")
    export(tmp_path / "arm", tmp_path / "adapter")  # needs no base
    with pytest.raises(ValueError, match=r"^the adapter's base is missing .*; say --base <folder"):
        export(tmp_path / "arm", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    export(tmp_path / "arm", tmp_path / "merged", merge=True, base=str(tmp_path / "moved"))
    assert_same(plain(tmp_path / "merged", dtype=torch.float32), trained)
    export(tmp_path / "arm", tmp_path / "named", base=str(tmp_path / "moved"))
    assert_same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "named", dtype=torch.float32), trained)


@pytest.mark.parametrize("merge", [False, True])
def test_other_weights_are_not_taken_for_the_base(lora_arm, student_folder, tmp_path, merge):
    other = shutil.copytree(student_folder, tmp_path / "other")
    model = plain(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="other holds other weights"):
        export(lora_arm[0], tmp_path / "out", merge=merge, base=str(other))
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_nothing(lora_arm, tmp_path):
    arm, _ = lora_arm
    (arm / "selection.json").write_text("{")
    with pytest.raises(ValueError):
        export(arm, tmp_path / "out", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["arm"]


def change(arm, kind):
    if kind == "no arm":
        shutil.rmtree(arm)
    elif kind == "before":
        (arm / "trained.json").rename(arm / "metrics.json")
    elif kind == "old":
        (arm / "trained.json").write_text('{"steps": 3}')


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("no arm", {}, "arm holds no trained arm; name a run's selector/"),
        ("before", {}, "arm is the student before training; name a run's selector/"),
        ("old", {}, "trained.json is of an earlier version"),
        ("fine", {"dtype": "fp8"}, "--dtype fp8 is unknown; set it to one of float32"),
        ("fine", {"base": "x"}, "--base x: this student was trained whole"),
        ("in use", {}, "out is there already and not an empty folder"),
    ],
)
def test_errors_are_one_sentence(full_arm, tmp_path, kind, how, message):
    arm, _ = full_arm
    change(arm, kind)
    if kind == "in use":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=message) as caught:
        export(arm, tmp_path / "out", **how)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "mine.txt").exists() == (kind == "in use")


def test_the_command(full_arm, tmp_path, monkeypatch, capsys):
    words = ["lark.export", str(full_arm[0]), str(tmp_path / "out"), "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert capsys.readouterr().out == f"export     {tmp_path / 'out'}: the whole model in bfloat16\n"
    with pytest.raises(SystemExit, match=r"^lark: .*out is there already"):
        main()
