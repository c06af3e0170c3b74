"""The wording of messages, here and nowhere else: setting, value, what is wrong, remedy, in one sentence."""

import pytest
from lark_command import lark

MESSAGES = {
    "budgt=3": "budgt is not a setting; did you mean budget? --cfg job prints all of them",
    "probe.race=true": "probe.race is not a setting; did you mean probe.share? --cfg job prints all of them",
    "logger=tensorboard": "logger=tensorboard is unknown; set it to one of csv, offline, wandb",
    "seed=abc": "seed=abc: this setting takes a whole number of 0 or more; correct it or leave it out",
    "budget=0": "budget=0: this setting takes a whole number of 1 or more; correct it or leave it out",
    "match=rows": "match=rows: this setting takes one of trajectories, tokens; correct it or leave it out",
    "sft.lr=1e-3x": "sft.lr=1e-3x: this setting takes a number; correct it or leave it out",
    "sft.average=mean": "sft.average='mean' is unknown; set it to trajectory or token",
    "task.held_out=1.5": "task.held_out=1.5 is not a share of problems; set it from 0 to below 1",
    "task.checker=maths": "task.checker='maths' is unknown; set it to one of math, number, choice, "
    "reasoning_gym, exact",
    "model.dtype=float8": "model.dtype='float8' is unknown; set it to auto, float32, bfloat16, float16",
    "model.path=/nowhere": "model.path=/nowhere does not exist; set it to a folder with weights or a .gguf file",
    "evaluation.engine=tgi": "evaluation.engine='tgi' is unknown; set it to one of transformers, vllm",
    "selector.policy.tau=0.1": "Only one of budget, tau and radius may set the sharpness, not "
    "selector.policy.budget=2, selector.policy.tau=0.1; set selector.policy.budget=null.",
}


@pytest.mark.parametrize("word", MESSAGES)
def test_a_wrong_setting_is_answered_by_one_sentence(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lark(word, f"paths.logs={tmp_path / 'logs'}")
    assert (done.code, done.err) == (1, f"lark: {MESSAGES[word]}\n")
