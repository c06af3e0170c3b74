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
from lark.generate import Sample, check_sampling, generate_samples
from lark.metrics import AverageAtK, PassAtK, ProblemMean, check_pass_at
from lark.rows import Fault, RowError, find_files, read_rows
from lark.verify import Answer, Checker

_FAULTS_SHOWN = 20


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


def read_problems(path: str | Path, *, limit: int | None = None, setting: str = "task.eval") -> list[dict[str, Any]]:
    """Rows of an evaluation file, with `problem_id` and `answer` as strings; further columns are carried along.

    A row has `problem_id` or `id`, `problem` (text) or `messages` (ending with the user's turn), and `answer`.

    Args:
        path: .jsonl, .json or .parquet.
        limit: read at most this many problems.
        setting: the setting that named the file, for messages.

    Raises:
        ValueError: the file is missing or holds no problem, or rows are faulty (with file, line and field of each).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"task.eval_limit={limit} leaves no problem; set it to 1 or more, or null for all")
    problems: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    for name, file in find_files(path, setting=setting).items():
        line = None
        try:
            for line, raw in read_rows(file):
                if limit is not None and len(problems) >= limit:
                    break
                try:
                    problem = _problem(raw)
                    if problem["problem_id"] in problems:
                        message = f"{problem['problem_id']!r} stands in an earlier row too: give each problem its own"
                        raise RowError("problem_id", "repeated", message)
                    problems[problem["problem_id"]] = problem
                except RowError as error:
                    faults.append(error.at(name, error.line or line))
        except RowError as error:
            faults.append(error.at(name, error.line or line))
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_FAULTS_SHOWN])
        more = f"\n  ... and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise ValueError(f"{setting}={path} has {len(faults)} faulty rows; correct or remove them:\n{shown}{more}")
    if not problems:
        raise ValueError(f"{setting}={path} holds no problem; set it to a file with rows")
    return list(problems.values())


def _problem(raw: Any) -> dict[str, Any]:
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, dict):
        raise RowError("row", "no object", "is no object of fields")
    name = "problem_id" if raw.get("problem_id") is not None else "id"
    identifier, answer, messages = raw.get(name), raw.get("answer"), raw.get("messages")
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise RowError("problem_id", "no id", "is missing or neither a string nor an integer: number the problems")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        raise RowError("answer", "no answer", "is missing or neither text nor number: give the right answer")
    if messages is not None:
        well_formed = isinstance(messages, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in messages
        )
        if not well_formed or not messages or messages[-1]["role"] != "user":
            message = 'is no list of {"role": ..., "content": ...} that ends with the user\'s turn'
            raise RowError("messages", "faulty messages", message)
    elif not isinstance(raw.get("problem"), str) or not raw["problem"].strip():
        raise RowError("problem", "no problem", "is missing, empty or no text: give the problem, or messages")
    return raw | {"problem_id": str(identifier), "answer": str(answer)}


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
    checker.validate([_answer("", problem) for problem in problems])
    prompts = [encode_prompt(prompt_messages(problem, system)) for problem in problems]
    settings = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop_ids": list(stop_ids),
    }
    drawn = _resume(partial, identity_hash(settings | {"prompts": prompts, "keys": list(rows)}))
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
    verdicts = checker.check([_answer(sample.text, rows[sample.problem_id]) for sample in drawn])
    records = [
        dataclasses.asdict(sample) | dataclasses.asdict(verdict)
        for sample, verdict in zip(drawn, verdicts, strict=True)
    ]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.unlink()
    return summarise(records, pass_at=pass_at)


def prompt_messages(problem: dict[str, Any], system: str | None) -> list[dict[str, str]]:
    """The prompt of a problem: its own messages, or an optional system turn and the problem as user turn."""
    if problem.get("messages"):
        return problem["messages"]
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": problem["problem"]}]


def _answer(text: str, problem: dict[str, Any]) -> Answer:
    return Answer(
        text=text,
        gold=problem["answer"],
        source_dataset=problem.get("source_dataset"),
        metadata=problem.get("metadata"),
    )


def _resume(partial: Path, identity: str) -> list[Sample]:
    """The samples of a partial file, which is cut to its unbroken lines, or begun anew if of another evaluation."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"identity": identity}) + "\n"
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    if not lines or lines[0] != header.encode():
        if lines:
            print(f"{partial} was begun with other prompts or settings: starting it again")
        partial.write_bytes(header.encode())
        return []
    kept, samples = len(lines[0]), []
    for line in lines[1:]:
        if not line.endswith(b"\n"):
            break  # cut off in the middle by a kill
        samples.append(Sample(**json.loads(line)))
        kept += len(line)
    with open(partial, "r+b") as file:
        file.truncate(kept)
    print(f"going on from {partial}: {len(samples)} samples are there")
    return samples


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The records of a samples.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def per_problem(path: str | Path) -> dict[str, list[bool]]:
    """Whether each sample of each problem is correct, by problem id and in the order of the samples."""
    correct: dict[str, list[bool]] = {}
    for record in sorted(read_samples(path), key=lambda record: record["sample"]):
        correct.setdefault(record["problem_id"], []).append(record["correct"])
    return correct


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
