"""The evaluation of an arm: each rank samples its share of the problems, rank 0 puts the answers together."""

import json
from pathlib import Path
from typing import Any

import torch

from lark.arms import Arm
from lark.cache import identity_hash, read_json, source_hash, write_json, write_text
from lark.chat import Chat
from lark.data import TrajectoryDataModule
from lark.evaluation import Sampling, evaluate, summarise
from lark.plan import barrier, is_main
from lark.samples import read_samples
from lark.verify import Checker


def load_arm(arm: Arm, data: TrajectoryDataModule, device: torch.device) -> torch.nn.Module:
    """The arm's student as it is on disk (the untrained one for "before"), on `device`, in eval mode."""
    dtype = data.student.resolve_dtype(device)
    student = data.student
    model: Any = student.load_model(dtype) if arm.selection is None else student.load_trained(arm.checkpoint, dtype)
    return model.to(device).eval()


def evaluate_arm(
    arm: Arm,
    data: TrajectoryDataModule,
    *,
    problems: dict[str, list[dict[str, Any]]],
    sampling: Sampling,
    checker: Checker,
    device: torch.device,
    rank: int,
    world: int,
) -> None:
    """Sample and check answers to every evaluation set; each rank its share of the problems, rank 0 the sum.

    Leaves samples-<set>.jsonl and metrics.json in the arm's folder. An arm that was evaluated with the same settings
    on the same problems before is left as it is.
    """
    identity = evaluation_identity(data, problems, sampling)
    if evaluated(arm, identity):
        return
    model = load_arm(arm, data, device)
    chat = data.trajectories.chat
    for name, rows in problems.items():
        mine = rows[rank::world]
        if mine:
            evaluate(
                model,
                chat.tokenizer,
                chat.encode_prompt,
                mine,
                checker=checker,
                max_new_tokens=data.task.max_new_tokens,
                seed=data.seed,
                stop_ids=stop_ids(chat),
                path=_part(arm.folder, name, rank, world),
                system=data.task.system,
                label=f"{arm.name} {name}",
                **vars(sampling),
            )
    barrier()
    if is_main():
        metrics = {name: _merge(arm.folder, name, rows, sampling, world) for name, rows in problems.items()}
        write_json(arm.folder / "metrics.json", {"identity": identity, "sets": metrics})
    barrier()


def _part(folder: Path, name: str, rank: int, world: int) -> Path:
    return folder / f"samples-{name}.rank{rank}of{world}.jsonl"


def _merge(folder: Path, name: str, problems: list[dict[str, Any]], sampling: Sampling, world: int) -> dict[str, Any]:
    """Samples of all ranks into samples-<name>.jsonl, in the order of the problems; their metrics."""
    parts = [_part(folder, name, rank, world) for rank in range(min(world, len(problems)))]
    order = {problem["problem_id"]: i for i, problem in enumerate(problems)}
    records = sorted(
        (record for part in parts for record in read_samples(part)),
        key=lambda record: (order[record["problem_id"]], record["sample"]),
    )
    write_text(folder / f"samples-{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for leftover in folder.glob(f"samples-{name}.rank*"):  # also of a killed run with another number of ranks
        leftover.unlink()
    return summarise(records, pass_at=sampling.pass_at)


def evaluation_identity(
    data: TrajectoryDataModule, problems: dict[str, list[dict[str, Any]]], sampling: Sampling
) -> dict[str, Any]:
    task = data.task
    settings = {k: v for k, v in vars(sampling).items() if k != "batch_size"}
    return {
        "sets": list(problems),
        "problems": identity_hash({"problems": problems}),
        "sampling": settings | {"pass_at": list(sampling.pass_at)},
        "task": [task.checker, task.pattern, task.system, task.max_new_tokens],
        "seed": data.seed,
        "dtype": data.dtype,
        "sources": source_hash(["evaluation", "problems", "samples", "generate", "answers", "verify", "metrics"]),
    }


def evaluated(arm: Arm, identity: dict[str, Any]) -> bool:
    if not identity["sets"]:
        return True
    path = arm.folder / "metrics.json"
    return path.exists() and read_json(path)["identity"] == identity


def action_of(arm: Arm, identity: dict[str, Any], training_only: bool) -> str:
    """What is left to do for an arm: train, evaluate, or nothing (reuse)."""
    if not arm.trained:
        return "train"
    if not training_only and not evaluated(arm, identity):
        return "evaluate"
    return "reuse"


def stop_ids(chat: Chat) -> list[int]:
    """What ends an answer: the end-of-turn token, which training teaches, and what an untrained student may know: the
    tokenizer's own end token, and the template's where model.end_token takes its place.
    """
    own = chat.tokenizer.eos_token_id
    ends = {chat.end_id, *([own] if isinstance(own, int) else own or [])}
    if chat.own_end is not None:
        ends.add(chat.tokenizer.convert_tokens_to_ids(chat.own_end))  # type: ignore[arg-type]
    return sorted(ends)
