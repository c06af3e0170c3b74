"""`task=math`, from the papers' layout of a pool to the table, with a Qwen2 student made here."""

import json
from pathlib import Path

import pytest
import teacher_folder as rsr
import torch
from lark_command import Done, lark
from tiny_student import SHAPE, byte_tokenizer

from lark.common.cache import read_json


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers that reads bytes and knows ChatML's marks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **SHAPE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    rsr.write_teacher_folder(folder / "pool")
    rsr.write_answers(folder / "numina.jsonl")
    rsr.write_evaluation(folder / "mine.jsonl")
    rows = [{"id": i, "problem": f"Find {i}.", "answer": str(i), "level": 1 + i % 5} for i in range(2)]
    (folder / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place: Path, qwen: Path, *words: str) -> Done:
    return lark(
        *["selector=lark", "model=qwen", f"model.path={qwen}", "model.lora.r=2"],
        *["task=math", f"task.pool={place / 'pool'}", f"task.answers={place / 'numina.jsonl'}"],
        f"task.eval={{mine: {place / 'mine.jsonl'}, math500: {place / 'math500.jsonl'}}}",
        *["task.max_length=512", "task.max_new_tokens=4", "sft.steps=2", "sft.batch_size=4", "sft.validations=2"],
        *["evaluation.samples=1", "evaluation.pass_at=[1]", "logger=csv", f"paths.logs={place / 'logs'}"],
        *words,
    )


@pytest.mark.slow
def test_from_the_pool_to_the_table(place: Path, qwen: Path) -> None:
    done = run(place, qwen)
    assert done.code == 0, done.err
    log = (done.folder / "run.log").read_text()
    for words in ("1 empty trajectory", "1 overlong", "questions repeated", "gamma lacks gen3", "(mine/4)"):
        assert words in log, words
    assert "mine" in done.out and "math500" in done.out
    assert read_json(done.folder / "summary.json")["status"] == "finished"
    (selection,) = done.folder.glob("selector/selection.jsonl")
    chosen = [json.loads(line) for line in selection.read_text().splitlines()]
    assert chosen and all(row["messages"][0]["content"] == rsr.SYSTEM for row in chosen)


def test_problems_of_evaluation_sets_can_leave_the_pool(place: Path, qwen: Path) -> None:
    done = run(place, qwen, "task.overlap=drop", "stop_after=selection")
    assert done.code == 0, done.err
    assert "8 in an evaluation set" in done.out
    rows = (done.folder / "selector" / "selection.jsonl").read_text()
    assert rsr.SHARED not in rows
    refused = run(place, qwen, "task.overlap=error", "stop_after=selection")
    assert refused.code == 1 and "task.overlap=error: 1 problems of the pool are in evaluation sets" in refused.err
