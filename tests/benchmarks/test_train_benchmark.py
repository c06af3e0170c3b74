"""benchmarks/train.py on a few trajectories: every contender trains the same tokens, and ours to the same losses."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS, SIZE = 2, 8
WORDS = ["--problems", "6", "--steps", str(STEPS), "--batch-size", str(SIZE), "--try-steps", "1"]


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("train")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def opened(module, tmp_path_factory):
    return module.open_rows(module.parse(WORDS), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def found(module, opened):
    """Every contender's figures, each having trained in this process."""
    data, batches = opened
    return {name: module.contend(name, data, batches, None) for name in module.CONTENDERS}


def padded_tokens(lengths, size):
    return sum(size * max(lengths[i : i + size]) for i in range(0, len(lengths), size))


def test_documents_train_our_spans(opened):
    data, batches = opened
    documents = importlib.import_module("contenders").documents
    rows = batches.ravel()
    for document, row in zip(documents(data.trajectories, rows), data.trajectories.read_tokens(rows), strict=True):
        trained = [label for label in document["labels"] if label != -100]
        assert document["input_ids"] == list(row.input_ids)
        assert trained == list(row.input_ids)[row.prompt_tokens :]


def test_the_same_rows_in_our_order(opened):
    data, batches = opened
    steps = [data.set_active_arm("selector").step(number) for number in range(STEPS)]
    for rows, step in zip(batches, steps, strict=True):
        assert sorted(rows) == sorted(step.rows)


def test_hugging_face_comes_to_our_losses(found):
    assert len(found["hf"]["losses"]) == STEPS
    np.testing.assert_allclose(found["hf"]["losses"], found["ours"]["losses"], atol=1e-5)
    assert found["hf"]["final_loss"] == pytest.approx(found["ours"]["final_loss"], abs=1e-5)


def test_all_train_as_many_tokens(found, opened):
    data, batches = opened
    lengths = data.trajectories.length[batches.ravel()]
    assert found["hf"]["computed_tokens"] == padded_tokens(lengths, 8)
    assert found["trl"]["computed_tokens"] == lengths.sum()
    assert found["hf_grouped"]["computed_tokens"] >= lengths.sum()
    for figures in found.values():
        assert figures["trained_tokens"] == data.trajectories.span_tokens[batches].sum()
        assert figures["final_loss"] == pytest.approx(found["ours"]["final_loss"], abs=0.02)
        assert figures["peak_bytes"] > 0


def test_packed_documents_are_kept_apart(module, found):
    assert found["trl"]["leakage"] < module.LEAK


def test_settings_divide_the_batch_and_hold_the_longest(module, opened):
    data, batches = opened
    assert module.settings_of("hf", data, batches) == [8]
    assert module.settings_of("hf_grouped", data, batches) == [8, 1, 2, 4]
    assert module.settings_of("hf_grouped", data, batches[:, :6]) == [2, 1]
    longest = int(data.trajectories.length[batches].max())
    assert module.settings_of("trl", data, batches) == list(dict.fromkeys(max(w, longest) for w in module.WIDTHS))


def test_the_limit_counts_both_kinds_of_products(module, opened, found):
    data, _ = opened
    model = importlib.import_module("contenders").fresh_model(data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in module.Adapters(model).parameters()) == trained
    assert all(seconds > 0 for seconds in found["ours"]["limit"].values())


def test_report(module, found, capsys):
    arguments = module.parse(WORDS)
    tried = {"hf_grouped": {"setting": 8, "tried": {"8": 100.0, "4": 90.0}}}
    assert module.report(arguments, found, tried, {"linear layers": 1.0}) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ratio_hf"] == pytest.approx(found["hf"]["seconds"] / found["ours"]["seconds"])
    assert figures["peak_bytes"] == found["ours"]["peak_bytes"]
    without = {name: of for name, of in found.items() if name != "trl"}
    wrong = without | {"hf": found["hf"] | {"losses": [loss + 1e-3 for loss in found["hf"]["losses"]]}}
    assert module.report(arguments, wrong, {}, {}) == 1
    printed = capsys.readouterr().out
    assert "DISAGREE" in printed and json.loads(printed.splitlines()[-1])["ratio_trl"] is None


def test_a_process_of_its_own(module, found, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", *WORDS])
    figures = module.invoke("ours", "--cache", str(tmp_path), say="")
    np.testing.assert_allclose(figures["losses"], found["ours"]["losses"], atol=1e-6)


def test_profile_accounts_for_all_time(module, opened):
    data, batches = opened
    shares = module.profiled(data, batches[:1])
    assert sum(shares.values()) == pytest.approx(1)
    assert {"linear layers", "linear layers (backward)", "optimizer"} <= set(shares)
