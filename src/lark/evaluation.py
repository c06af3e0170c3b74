"""Evaluation: problems -> prompts -> samples -> verdicts -> metrics."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lark.bar import bar
from lark.cache import identity_hash, replacing
from lark.generate import check_sampling, generate_samples
from lark.metrics import AverageAtK, PassAtK, ProblemMean, check_pass_at
from lark.problems import answer_to, prompt_messages
from lark.samples import resume
from lark.verify import Checker


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How students are evaluated; the same for every arm.

    samples: per problem.  pass_at: the k of each pass@k.  temperature: 0 = most likely token.  top_p: nucleus.
    batch_size: samples generated at once; changes no result beyond rounding.
    """

    samples: int = 4
    pass_at: tuple[int, ...] = (1, 4)
    temperature: float = 0.6
    top_p: float = 0.95
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "pass_at", tuple(dict.fromkeys(self.pass_at)))
        if not self.pass_at:
            raise ValueError("evaluation.pass_at=[] asks for no pass@k; set it to [1], say")
        check_sampling(self.samples, self.temperature, self.top_p, self.batch_size)
        for k in self.pass_at:
            check_pass_at(k, self.samples)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encode_prompt: Callable[[list[dict[str, str]]], list[int]],
    problems: Sequence[dict[str, Any]],
    *,
    checker: Checker,
    samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    stop_ids: Sequence[int],
    path: str | Path,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    pass_at: Iterable[int] = (1,),
    label: str = "evaluating",
) -> dict[str, float | int]:
    """Samples answers to problems, checks them, writes them to `path` and returns their metrics (`summarise`).

    Samples are appended to `<path>.partial` as batches finish; after a kill, the same call generates only what is
    missing there. `path` belongs to one set of weights: the partial file knows prompts and settings, not the weights.

    Args:
        encode_prompt: messages of a prompt -> token ids, generation prompt included.
        problems: rows as `read_problems` gives them.
        checker: decides what is correct; carries the task's answer pattern.
        path: samples.jsonl to write, one line a sample, in the order of the problems.
        system: system turn put before `problem`; rows that have `messages` are taken as they are.
        pass_at: the k of each pass@k.
        label: what the progress line calls it.

    Further arguments are those of `generate_samples`.

    Raises:
        ValueError: no problems, a gold answer the checker cannot read, or a setting out of its range.
    """
    if not problems:
        raise ValueError("task.eval holds no problem to evaluate on; set it to a file with rows")
    pass_at = tuple(pass_at)
    for k in pass_at:
        check_pass_at(k, samples)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    rows = {problem["problem_id"]: problem for problem in problems}
    assert len(rows) == len(problems), "problem ids are distinct"
    checker.validate([answer_to(problem, "") for problem in problems])
    prompts = [encode_prompt(prompt_messages(problem, system)) for problem in problems]
    settings = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop_ids": list(stop_ids),
    }
    drawn = resume(partial, identity_hash(settings | {"prompts": prompts, "keys": list(rows)}))
    done = {(sample.problem_id, sample.sample) for sample in drawn}
    batches = generate_samples(model, tokenizer, prompts, list(rows), **settings, batch_size=batch_size, done=done)
    total = len(rows) * samples
    with (
        open(partial, "a", encoding="utf-8") as file,
        bar(label, total, "samples", initial=len(drawn)) as progress,
    ):
        for batch in batches:
            file.writelines(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in batch)
            file.flush()
            drawn += batch
            progress.update(len(batch))
    assert len(drawn) == total, f"{len(drawn)} of {total} samples drawn"
    order = {problem_id: i for i, problem_id in enumerate(rows)}
    drawn.sort(key=lambda sample: (order[sample.problem_id], sample.sample))
    verdicts = checker.check([answer_to(rows[sample.problem_id], sample.text) for sample in drawn])
    records = [
        dataclasses.asdict(sample) | dataclasses.asdict(verdict)
        for sample, verdict in zip(drawn, verdicts, strict=True)
    ]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.unlink()
    return summarise(records, pass_at=pass_at)


def summarise(records: Sequence[dict[str, Any]], *, pass_at: Iterable[int] = (1,)) -> dict[str, float | int]:
    """Metrics of an evaluation's records, in the order of problems and samples.

    Returns:
        avg@<samples>, pass@<k> for each k, boxed, stop, truncated (shares from 0 to 1), timeouts (checks cut off),
        problems, and samples (per problem).

    Raises:
        ValueError: a k larger than the number of samples.
    """
    num_problems = len({record["problem_id"] for record in records})
    num_samples, rest = divmod(len(records), num_problems)
    assert rest == 0, f"{len(records)} samples of {num_problems} problems"
    local = {"sync_on_compute": False}  # the records are complete: other ranks need not take part
    metrics: dict[str, tuple[Metric, str]] = {f"avg@{num_samples}": (AverageAtK(**local), "correct")}
    metrics |= {f"pass@{k}": (PassAtK(k, **local), "correct") for k in pass_at}
    metrics |= {name: (ProblemMean(**local), name) for name in ("boxed", "stop", "truncated")}
    summary: dict[str, float | int] = {}
    for name, (metric, column) in metrics.items():
        metric.update(torch.tensor([record[column] for record in records]).view(num_problems, num_samples))
        summary[name] = float(metric.compute())
    timeouts = sum(record["timed_out"] for record in records)
    return summary | {"timeouts": timeouts, "problems": num_problems, "samples": num_samples}
