"""What a run will take: counts against what PyTorch counts, the bill of a run, rates that were measured."""

import json

import pytest
import torch
from lark_command import lark
from torch.utils.flop_counter import FlopCounterMode

from lark.experiment.bill import CostSettings, find_device, read_shape
from lark.experiment.cost import Device, Shape, Work, estimate_stages
from lark.student.student import Student

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_students_numbers_are_the_loaded_ones(lora):
    student = Student(name="tiny", path="shipped:tiny", lora=lora)
    shape, model = read_shape(student, CPU), student.load_trainable(torch.float32)
    assert shape.parameters == sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tokens", [16, 96])
def test_flops_are_those_that_torch_counts(tokens):
    """It counts all of the attention's products, causal or not: twice ours."""
    student = Student(name="tiny", path="shipped:tiny", attention="eager")
    shape, model = read_shape(student, CPU), student.load_trainable(torch.float32)
    with FlopCounterMode(display=False) as counted:
        logits = model(input_ids=torch.zeros(1, tokens, dtype=torch.long)).logits
    forward = counted.get_total_flops()
    attention = 2 * shape.layers * shape.width * tokens * tokens
    assert forward == pytest.approx(shape.count_forward(tokens, tokens) + attention, rel=0.01)
    with FlopCounterMode(display=False) as counted:
        logits.sum().backward()
    total = forward + counted.get_total_flops()
    assert total == pytest.approx(shape.count_training(tokens, tokens) + 3 * attention, rel=0.01)


SHAPE = Shape(
    parameters=100,
    products=80,
    trained=10,
    layers=1,
    width=4,
    cache_bytes=2,
    weight_bytes=200,
    is_full=False,
    recomputes=True,
)
WORK = Work(
    passes={"statistics": (1, 0), "gradients": (1, 1)},
    rows=50,
    row_tokens=20.0,
    arms=2,
    steps=3,
    batch_size=8,
    held_out_rows=40,
    sampled=30,
    answer_tokens=10.0,
)


def test_stages_by_hand():
    device = Device(name="", flops=1e3, bandwidth=1e9, basis="")
    statistics, gradients, training, held_out, answers = estimate_stages(SHAPE, WORK, device, {"training": 5e2})
    token = 2 * 80 + 2 * 4 * 20
    assert (statistics.tokens, statistics.flops, statistics.seconds) == (1000, 1000 * token, token)
    assert gradients.flops == 2 * statistics.flops  # LoRA: no gradients of the weights
    assert training.tokens == 2 * 3 * 8 * 20 and training.flops == training.tokens * token * 3
    assert training.seconds == training.flops / 5e2
    assert training.memory == 200 + 12 * 10
    assert held_out.tokens == 2 * 40 * 20 and held_out.flops == held_out.tokens * token
    assert answers.tokens == 3 * 30 * 10 and answers.seconds == answers.flops / 1e3
    assert estimate_stages(SHAPE, WORK, device, {"sampling": 9.0})[-1].seconds == 100


def test_devices():
    assert find_device(CostSettings(device="h100"), CPU).flops == pytest.approx(0.4 * 989e12)
    with pytest.raises(ValueError, match=r"cost\.device"):
        CostSettings(device="abacus")


def test_a_bill_is_printed_and_compared(tmp_path, monkeypatch):
    """Nothing is scored for the bill; what the run took is in its summary, and is the next bill's rate."""
    monkeypatch.chdir(tmp_path)
    small = [
        "task.limit=20",
        "task.eval_limit=2",
        "evaluation.samples=1",
        "sft.steps=2",
        "logger=csv",
        "diagnostics=none",
    ]
    bill = lark(*small, "stop_after=cost")
    assert bill.code == 0 and "statistics" in bill.out and "scoring, training, sampling assumed" in bill.out
    assert not list(tmp_path.glob("logs/cache/statistics/*/manifest.json"))
    run = lark(*small)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert all(summary["cost"][kind]["seconds"] > 0 for kind in ("scoring", "training"))
    assert "scoring, training as measured here" in lark(*small, "stop_after=cost").out
