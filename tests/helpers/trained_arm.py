"""A trained arm's folder as a run leaves it, without the training: weights moved a little, files by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from lark.student.student import save_student

LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}

SELECTION = {
    "inputs": {
        "task": "sums",
        "pool": "67addcfa33a06eb5",
        "asked": "small",
        "score": "Lark(length_exponent=0.0)",
        "filter": None,
        "seed": 0,
        "dropped_rows": {"overlong": 3, "empty": 0},
    },
    "rule": "lark",
    "policy": {"kind": "chi2", "budget": 2, "tau": None, "prior": "uniform", "gap": {"p50": 0.1}},
    "counts": {"candidates": 154, "chosen": 44, "not_chosen": 110, "problems": 22, "problems_without_choice": 0},
    "tokens": 1715,
    "effective_sample_size": 27.57,
    "teacher_share": {"expert_steps": 0.87, "expert_prose": 0.13},
}
EVALUATION = {
    "sampling": {"samples": 2, "pass_at": [1, 2], "temperature": 0.6, "top_p": 0.95}
    | {"max_new_tokens": 24, "seed": 0, "engine": "transformers", "dtype": "float32", "checker": "number"},
    "metrics": {"eval": {"avg@2": 0.25, "stop": 0.5, "problems": 6}, "shifted": {"avg@2": 0.125, "problems": 7}},
}


def trained_json(student, **changed):
    """What an arm's trained.json says."""
    settings = {key: value for key, value in asdict(student).items() if not key.startswith("_")}
    own = student.identity() | {"lora": student.lora, "dtype": student.dtype, "attention": student.attention}
    recipe = {"batch_size": 16, "lr": 3e-4, "betas": [0.9, 0.999], "average": "trajectory", "weighted": True}
    return {
        "student": settings,
        "identity": {"student": own, "tokens": {"cut_to": 128}, "recipe": recipe, "seed": 0, "precision": "32-true"},
        "steps": 3,
        "seconds": 1.5,
        "trajectories": 44,
        "tokens": 1715,
        "curve": [{"step": 0, "held_out/loss": 0.1220}, {"step": 3, "held_out/loss": 0.1199}],
        "held_out": {"start": {"step": 0, "held_out/loss": 0.1220}, "end": {"step": 3, "held_out/loss": 0.1199}},
    } | changed


def write_arm(folder: Path, student, *, metrics=None):
    """The folder of an arm of this student; returns the model as it was saved, in eval mode."""
    model = student.load_trainable(torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_student(model, student.load_chat(), folder / "checkpoint", student=student)
    files = {"trained.json": trained_json(student), "selection.json": SELECTION, "metrics.json": metrics}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return model.eval()
