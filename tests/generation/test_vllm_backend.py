"""vLLM's process, with a module in vLLM's place that has the part of its interface that is used."""

import json
import sys
from typing import Any

import pytest
from tiny_student import byte_tokenizer

from lark.common.errors import LarkError
from lark.generation.vllm_backend import (
    derive_vllm_seed,
    find_vllm_python,
    find_vllm_source,
    generate_with_vllm,
    make_environment,
)

pytestmark = pytest.mark.slow

# Samples are the seed's digits; one that runs into `max_tokens` is cut off, any other ends with the stop token. Later
# requests end first. DIE_AFTER=n: the process dies after n of them, in the middle of a line.
STAND_IN = {
    "torch/__init__.py": """
__version__ = "2.0"

class cuda:
    device_count = staticmethod(lambda: 2)
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": """
from dataclasses import dataclass

@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
""",
    "vllm/sampling_params.py": """
from enum import Enum

RequestOutputKind = Enum("RequestOutputKind", "CUMULATIVE DELTA FINAL_ONLY")
""",
    "vllm/__init__.py": """
import json, os, sys
from types import SimpleNamespace as Record

__version__ = "0.0"

class SamplingParams(Record):
    pass

class LLM:
    def __init__(self, *, model, max_model_len, tensor_parallel_size, skip_tokenizer_init, generation_config, **others):
        self.llm_engine, self.requests, self.done = self, [], 0
        self.length = max_model_len
        self.die_after = int(os.environ.get("DIE_AFTER", -1))
        print("a line of vLLM's own")

    def add_request(self, request_id, prompt, params, lora_request=None):
        assert isinstance(request_id, str) and len(prompt["prompt_token_ids"]) + params.max_tokens <= self.length
        assert params.n == 1 and params.output_kind.name == "FINAL_ONLY" and params.ignore_eos
        assert params.detokenize is False
        if lora_request is not None:
            assert os.path.exists(lora_request.lora_path) and lora_request.lora_int_id > 0
        self.requests.append((request_id + "-of-the-engine", prompt["prompt_token_ids"], params, lora_request))
        return request_id + "-of-the-engine"

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        if self.done == self.die_after:
            with open(os.path.join(sys.argv[1], "tokens.jsonl"), "a") as file:
                file.write('{"number": 1, "tok')
            print("CUDA out of memory, says the stand-in", file=sys.stderr, flush=True)
            os._exit(7)
        self.done += 1
        name, prompt, params, lora = self.requests.pop()
        digits = [int(digit) for digit in str(params.seed)][: 4 + params.seed % 30]
        ids = ([250] if lora else []) + prompt[-1:] + digits
        cut = len(ids) >= params.max_tokens
        ids = ids[: params.max_tokens] if cut else ids + params.stop_token_ids[:1]
        output = Record(
            token_ids=tuple(ids),
            finish_reason="length" if cut else "stop",
            stop_reason=None if cut else params.stop_token_ids[0],
        )
        unfinished = Record(request_id=name, finished=False, outputs=[])
        return [unfinished, Record(request_id=name, finished=True, outputs=[output])]
""",
}
PROMPTS = {f"p{i}": [100 + i] * (3 + i % 4) for i in range(6)}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    for name, source in STAND_IN.items():
        path = tmp_path / "stand_in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))


@pytest.fixture
def draw(tmp_path, tokenizer):
    def batches(prompts=PROMPTS, **changes):
        settings: dict[str, Any] = dict(
            model="a/model", samples=3, temperature=0.6, top_p=0.95, max_new_tokens=15, seed=0
        )
        settings |= {"stop_ids": [tokenizer.eos_token_id]}
        folder = changes.pop("folder", tmp_path / "vllm")
        return generate_with_vllm(folder, tokenizer, list(prompts.values()), list(prompts), **settings | changes)

    return batches


def by_key(batches):
    samples = [sample for batch in batches for sample in batch]
    found = {(sample.problem_id, sample.sample): sample for sample in samples}
    assert len(found) == len(samples)
    return found


def expected_text(tokenizer, key, sample, limit, seed=0):
    own = derive_vllm_seed(seed, key, sample)
    ids = [PROMPTS[key][-1], *[int(digit) for digit in str(own)][: 4 + own % 30]]
    return tokenizer.decode(ids[:limit]), len(ids) >= limit


def test_every_sample_comes_once_with_its_own_seed_and_end(stand_in, draw, tokenizer):
    found = by_key(draw())
    assert found.keys() == {(key, n) for key in PROMPTS for n in range(3)}
    assert {sample.stop for sample in found.values()} == {True, False}
    for (key, n), sample in found.items():
        text, cut = expected_text(tokenizer, key, n, 15)
        assert (sample.text, sample.truncated, sample.stop) == (text, cut, not cut)
        assert sample.num_tokens == len(text) + (not cut)


def test_samples_follow_from_seed_problem_and_number(stand_in, draw, tmp_path):
    found = by_key(draw(samples=1))
    other = by_key(draw(samples=1, seed=1, folder=tmp_path / "other"))
    assert found.keys() == other.keys() and all(found[key] != other[key] for key in found)
    reordered = dict(reversed(PROMPTS.items()))
    assert by_key(draw(reordered, samples=1, folder=tmp_path / "reordered")) == found


def test_the_record_says_what_was_used_and_that_it_is_not_reproducible(stand_in, draw, tmp_path):
    by_key(draw())
    record = json.loads((tmp_path / "vllm" / "engine.json").read_text())
    assert record["bit_reproducible"] is False and record["version"] == "0.0" and record["python"] == sys.executable
    assert record["arguments"]["tensor_parallel_size"] == 2  # the stand-in's GPUs
    assert record["arguments"]["max_model_len"] == 6 + 15
    assert "a line of vLLM's own" in (tmp_path / "vllm" / "vllm.log").read_text()


def test_what_was_sampled_before_a_death_is_given(stand_in, draw, tmp_path, monkeypatch):
    whole = by_key(draw(folder=tmp_path / "whole"))
    monkeypatch.setenv("DIE_AFTER", "7")
    seen, batches = [], draw()
    with pytest.raises(LarkError, match=r"exit code 7 and 11 of 18 samples missing(.|\n)*CUDA out of memory"):
        for batch in batches:
            seen += batch  # kept by the caller
    assert by_key([seen]).items() <= whole.items() and len(seen) == 7
    assert not (tmp_path / "vllm" / "tokens.jsonl").read_text().endswith("\n")
    monkeypatch.delenv("DIE_AFTER")
    done = set(whole) - {("p1", 0), ("p4", 2)}
    assert by_key(draw(done=done)) == {key: whole[key] for key in set(whole) - done}


def test_nothing_to_do_starts_nothing(draw, tmp_path):
    assert list(draw(done={(key, n) for key in PROMPTS for n in range(3)})) == []
    assert not (tmp_path / "vllm").exists()


def test_an_adapter_goes_to_vllm_with_its_rank(stand_in, draw, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 24}')
    adapted = by_key(draw(samples=1, adapter=str(tmp_path / "adapter")))
    plain = by_key(draw(samples=1, folder=tmp_path / "plain"))
    assert all(adapted[key].text != plain[key].text for key in plain)
    arguments = json.loads((tmp_path / "vllm" / "engine.json").read_text())["arguments"]
    assert arguments["enable_lora"] and arguments["max_lora_rank"] == 32


def test_no_vllm_is_one_sentence_with_the_remedy(draw, monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('no vllm here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LarkError, match=r"evaluation.engine=vllm .* \(ImportError: no vllm here\)"):
        list(draw())
    monkeypatch.setenv("LARK_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(LarkError, match=r"evaluation\.vllm_python=/nowhere/python cannot be started"):
        list(draw())


def test_the_python_of_make_vllm_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("LARK_VLLM_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert find_vllm_python() == str(python)
    monkeypatch.setenv("LARK_VLLM_PYTHON", "/other/python")
    assert find_vllm_python() == "/other/python"


def test_a_reader_that_leaves_ends_the_process(stand_in, draw):
    batches = draw(samples=50)
    assert next(batches)
    batches.close()  # waits for the process; would hang if it went on


def test_an_engine_sees_its_own_gpus_and_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6")
    assert make_environment([1, 2])["CUDA_VISIBLE_DEVICES"] == "5,GPU-6"
    assert make_environment(None)["CUDA_VISIBLE_DEVICES"] == "4,5,GPU-6" and "RANK" not in make_environment(None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert make_environment([6, 7])["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_sources_of_students(make_student, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 2}')
    student = make_student(lora={"r": 2})
    assert find_vllm_source(student) == {"model": student.path, "revision": None, "adapter": None, "config": None}
    assert find_vllm_source(student, "trained")["adapter"] == "trained"
    trained = {"model": "trained", "revision": None, "adapter": None, "config": None}
    assert find_vllm_source(make_student(), "trained") == trained
    hub = make_student(path=None, id="a/model", revision="abc")
    assert find_vllm_source(hub) == {"model": "a/model", "revision": "abc", "adapter": None, "config": None}
    adapted = make_student(lora={"r": 2}, adapter=str(tmp_path / "adapter"))
    assert find_vllm_source(adapted)["adapter"] == str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.adapter.*takes one"):
        find_vllm_source(adapted, "trained")
    (tmp_path / "s.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.path.*gguf"):
        find_vllm_source(make_student(path=str(tmp_path / "s.gguf")))
