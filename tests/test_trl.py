"""WeightedSFTTrainer: the gradient of one optimizer step is that of the weighted loss, by dense autograd."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig

from lark.common.errors import LarkError
from lark.trl import WeightedSFTTrainer, compute_coefficients

WEIGHTS = [0.25, 2.0, 0.0, 1.5, 1.0, 0.75]
LENGTHS = [5, 9, 4, 12, 7, 6]
PROMPT = 3


def rows() -> Dataset:
    """Rows of random tokens, already tokenised: a prompt of three, then what is trained."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (PROMPT + length,), generator=generator).tolist() for length in LENGTHS]
    labels = [[-100] * PROMPT + row[PROMPT:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "weight": WEIGHTS})


def dense_gradient(folder: Path, average: str) -> torch.Tensor:
    """The gradient of the formula, one row after the other, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    means, sums = [], []
    row: Any
    for row in rows():
        logp = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        target = torch.tensor(row["input_ids"][1:])
        surprisal = -logp[torch.arange(len(target)), target][PROMPT - 1 :]
        means.append(surprisal.mean())
        sums.append(surprisal.sum())
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    if average == "trajectory":
        loss = (weight * torch.stack(means)).mean()
    else:
        loss = (weight * torch.stack(sums)).sum() / (weight * torch.tensor(LENGTHS)).sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained_gradient(folder: Path, output: Path, average: str, **settings) -> torch.Tensor:
    """What one step of plain SGD with rate 1 moved the weights by."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fixed = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
    }
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    args = SFTConfig(output_dir=str(output), max_length=24, bf16=False, **fixed, **quiet, **settings)
    trainer = WeightedSFTTrainer(model, args=args, train_dataset=rows(), average=average)
    trainer.train()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("average", ["trajectory", "token"])
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "packing": True},
    ],
    ids=["one", "accumulated", "uneven", "packed"],
)
def test_the_gradient_is_the_formulas(student_folder, tmp_path, average, settings):
    found = trained_gradient(student_folder, tmp_path, average, **settings).double()
    expected = dense_gradient(student_folder, average)
    assert (found - expected).norm() < 2e-6 * (1 + expected.norm())
    plain = dense_gradient_of_equal_weights(student_folder)
    assert (found - plain).norm() > 0.05 * expected.norm(), "the weights act"


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_trl import trained_gradient
found = trained_gradient(Path(sys.argv[2]), Path(sys.argv[3]), "trajectory", per_device_train_batch_size=1,
                         gradient_accumulation_steps=3, ddp_backend="gloo")
if int(__import__("os").environ["RANK"]) == 0:
    torch.save(found, Path(sys.argv[3]) / "found.pt")
"""


@pytest.mark.slow
def test_two_ranks_are_one(student_folder, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    words = [str(Path(__file__).parent), str(student_folder), str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run([*launch, str(tmp_path / "ranks.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True).double()
    expected = dense_gradient(student_folder, "trajectory")
    assert (found - expected).norm() < 2e-6 * (1 + expected.norm())


def dense_gradient_of_equal_weights(folder: Path) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[__name__], "WEIGHTS", [1.0] * len(WEIGHTS))
        return dense_gradient(folder, "trajectory")


def test_coefficients():
    row = {"labels": [-100, -100, 7, 8], "weight": 3.0}
    assert compute_coefficients(row, average="trajectory") == {
        "loss_weights": [0, 0, 1.5, 1.5],
        "loss_counts": [0, 0, 0.5, 0.5],
    }
    assert compute_coefficients({"labels": [7, 8]}, average="token")["loss_counts"] == [0, 1.0]


def test_settings_that_train_another_loss_are_refused(student_folder, tmp_path):
    for setting in ({"loss_type": "dft"}, {"packing": True, "packing_strategy": "wrapped"}):
        with pytest.raises(LarkError, match=next(reversed(setting))):
            trained_gradient(student_folder, tmp_path, "trajectory", **setting)
    with pytest.raises(LarkError, match="average"):
        trained_gradient(student_folder, tmp_path, "mean")
