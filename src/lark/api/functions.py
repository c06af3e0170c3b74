"""Do a part of a run each, for `import lark`: load_pool, load_student, score, select, train, evaluate, compare.

Each call does a part of a run (lark.experiment) by the same classes and functions, in this process and on one device,
and keeps what it computes in the cache. Settings are those of the command line, composed from the same files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lark.answers.checker import Checker
from lark.api.parts import (
    DEFAULT_MODEL,
    compose_run,
    find_task,
    make_data,
    make_rule,
    name_option,
    open_cache,
    open_session,
    run_passes,
)
from lark.api.results import Chosen, Comparison, Evaluation, Pool, Scores, TrainedStudent
from lark.common.cache import hold_lock
from lark.common.errors import LarkError
from lark.common.log import announce
from lark.comparison.inference import compute_paired_difference
from lark.config import build_part, compose, list_options
from lark.evaluation.evaluate import Evaluator, Sampling, identify_weights
from lark.experiment.console import announce_scoring
from lark.pool.files import store_rows
from lark.scoring.passes import Statistics
from lark.selection.rule import Rule
from lark.student.student import SHIPPED, Student
from lark.tasks.problems import read_problems
from lark.tasks.task import Task
from lark.training.arms import make_arm
from lark.training.arms import train as train_arm
from lark.training.end_token import EndTokenCheck
from lark.training.trainer import TrainerFactory

Rows = Any
"""A path (file, folder, or a list of these), a datasets.Dataset, a pandas.DataFrame, or an iterable of dicts."""


# ---- the functions


def load_pool(source: Rows = None, *, task: str = "jsonl", cache: str | Path | None = None, **settings: Any) -> Pool:
    """Read and check a pool of trajectories.

    source: .jsonl, .json, .parquet or .csv files (a path, folder or a list of these), a datasets.Dataset, a
        pandas.DataFrame or an iterable of rows; None takes the task's own, as in load_pool(task="arithmetic").
    task: an option of `task=`, whose settings are taken by name: max_length, limit, on_error, checker, pattern, eval,
        overlap, ... `held_out` is 0 here (on the command line .1): set it, to have a held-out curve in training.
    cache: the folder of caches; None: $LARK_CACHE, else ~/.cache/lark.

    Raises LarkError (PoolError with file, line and field of every fault) for what cannot be read.
    """
    with open_session():
        cache = open_cache(cache)
        if source is not None:
            settings["pool"] = store_rows(source, cache / "given")
        pool = Pool(task=build_part(compose(task=task), "task", {"held_out": 0.0, **settings}), cache=cache)
        _ = pool.rows  # its faults show here
        return pool


def load_student(name: str | Path, **settings: Any) -> Student:
    """Describe a student; its weights load when they are needed.

    name: an option of `model=` (tiny, smollm2, qwen, ...), a folder with weights, a .gguf file, or an id on the
        Hugging Face hub. settings: those of `model.`, such as dtype, lora (None trains every parameter), template.

    Raises LarkError for a folder that does not exist or a setting that is wrong.
    """
    with open_session():
        if str(name) in list_options("model"):
            return build_part(compose(model=str(name)), "model", settings)
        path = Path(name).expanduser()
        if path.exists() or str(name).startswith(SHIPPED):
            where = {"name": path.stem, "path": str(path) if path.exists() else str(name), "id": None}
        elif str(name).count("/") == 1:
            where = {"name": path.name, "id": str(name)}
        else:
            raise LarkError(
                f"student={str(name)!r} is neither a folder, a .gguf file or a hub id (owner/name), nor one of "
                f"{', '.join(list_options('model'))}; correct it"
            )
        return build_part(compose(model=DEFAULT_MODEL), "model", where | settings)


def score(
    pool: Pool | Rows,
    student: Student | str | Path,
    *,
    rule: str | Rule | Callable = "lark",
    seed: int = 0,
    device: str = "auto",
    **probe: Any,
) -> Scores:
    """Have the student read every trajectory: one forward pass, and what else `rule` asks for; kept in the cache.

    pool: a Pool, or what `load_pool` takes. device: auto | cpu | gpu. probe: settings of `probe.`, such as
    keep="tokens" (one value a token, too), top_k=50, batch_tokens.
    """
    with open_session():
        pool = pool if isinstance(pool, Pool) else load_pool(pool)
        config = compose_run(seed=seed, device=device, rule=rule)
        settings = build_part(config, "probe", probe)
        made = make_rule(config, rule, {})
        data = make_data(config, pool, _to_student(student), made, probe=settings, needs=(Statistics(),))
        run_passes(data)
        announce_scoring(data)
        return Scores(pool=pool, data=data)


def select(
    scores: Scores,
    rule: str | Rule | Callable = "lark",
    *,
    budget: int | None = None,
    like: Chosen | None = None,
    match: str = "trajectories",
    seed: int = 0,
    **settings: Any,
) -> Chosen:
    """Choose trajectories and their weights; passes of the student that the rule needs are run, if not cached.

    rule: a name (an option of `selector=`), a function of the candidates that gives one number a row (higher = first),
        "module:function", or a lark.selection.rule.Rule.
    budget: trajectories a problem; None: 2.
    like: makes it the baseline of that selection: as many trajectories of each problem as there or, with
        match="tokens", as many tokens in all; equal weights.
    settings: those of `selector.`: score={"length_exponent": 1}, policy={"kind": "kl", "tau": .1}; and `filter`.

    Raises LarkError when nothing can be chosen, or for settings that are wrong.
    """
    with open_session():
        config = compose_run(seed=seed, rule=rule, match=match)
        config.budget = config.budget if budget is None else budget
        made, source = make_rule(config, rule, settings), scores.data
        first, second = (made, None) if like is None else (like.rule, made)
        data = make_data(
            config, scores.pool, source.student, first, second, probe=source.probe, opened=source.trajectories
        )
        data.check_columns()
        run_passes(data)
        name = "selector" if like is None else "baseline"
        data.selections = {} if like is None else {"selector": like.selection}
        data.selections[name] = data.choose(name, None if like is None else like.selection)
        chosen = Chosen(pool=scores.pool, data=data, name=name)
        announce("selected", chosen.describe())
        return chosen


def train(
    chosen: Chosen, *, student: Student | str | Path | None = None, seed: int = 0, device: str = "auto", **recipe: Any
) -> TrainedStudent:
    """Train a student on a selection with its weights, unless the cache holds that very student.

    student: None: the one that scored. recipe: settings of `sft.` (epochs, steps, batch_size, lr, weighted, ...);
    defaults are those of the student's option of `model=`.

    Raises LarkError where a step does not fit into memory or training diverges.
    """
    with open_session():
        learner = chosen.data.student if student is None else _to_student(student)
        config = compose_run(seed=seed, device=device, model=name_option(learner))
        data = make_data(
            config,
            chosen.pool,
            learner,
            chosen.rule,
            probe=chosen.data.probe,
            recipe=build_part(config, "sft", recipe),
            opened=chosen.data.trajectories if student is None else None,
        )
        overlong = int((~data.trajectories.fits[chosen.selection.row]).sum())
        if overlong:
            raise LarkError(
                f"{overlong:,} of {len(chosen):,} chosen trajectories are longer than max_length in the tokens of "
                f"{learner.name}; score the pool with that student, or raise max_length"
            )
        data.selections = {chosen.name: chosen.selection}
        steps = data.recipe.count_steps(len(chosen))
        arms = chosen.pool.cache / "arms"
        arm = make_arm(chosen.name, chosen.rule.name, data, recipe=data.recipe, steps=steps, arms=arms)
        with hold_lock(arm.folder):
            if not arm.is_trained:
                make_trainer = partial(TrainerFactory(config.trainer, arm.folder).make, progress=arm.name)
                train_arm(arm, data, make_trainer=make_trainer, callbacks=[EndTokenCheck(data)])
        return TrainedStudent(student=learner, folder=arm.folder, chosen=chosen)


def evaluate(
    student: TrainedStudent | Student | str | Path,
    problems: Pool | Rows,
    *,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Ask a student the problems of evaluation sets, several times each, and check the answers; kept in the cache.

    problems: rows {"problem_id": ..., "problem": ..., "answer": ...} as files (or {name: file}), a datasets.Dataset, a
        pandas.DataFrame or an iterable; names of benchmarks, such as "aime24, math500"; or a Pool with sets of its own.
    settings: those of `evaluation.` (samples, temperature, top_p, pass_at, engine, ...) and of `task.` (checker,
        pattern, system, max_new_tokens, eval_limit).
    """
    with open_session():
        cache = problems.cache if isinstance(problems, Pool) else open_cache(cache)
        of_task = {field.name for field in fields(Task)} & settings.keys()
        task_settings = {name: settings.pop(name) for name in of_task}
        config = compose_run(seed=seed, device=device)
        if "samples" in settings:
            settings.setdefault("pass_at", [1, settings["samples"]])
        sampling: Sampling = build_part(config, "evaluation", settings)
        task = find_task(problems, cache, task_settings)
        files = task.prepare_evaluation(cache)
        if not files:
            raise LarkError("problems=... has no evaluation set; name a file, or load_pool(..., eval=<file>)")
        sets = {name: read_problems(path, limit=task.eval_limit) for name, path in files.items()}
        trained = student if isinstance(student, TrainedStudent) else None
        asked = trained.student if trained is not None else _to_student(student)  # type: ignore[arg-type]
        trainers, chat = TrainerFactory(config.trainer, cache), asked.load_chat()
        backend = sampling.make_backend(
            asked,
            chat,
            trained=None if trained is None else trained.checkpoint,
            weights=identify_weights(asked, None if trained is None else trained.folder),
            device=trainers.make().strategy.root_device,
        )
        with Checker(task.checker, pattern=task.pattern) as checker:
            evaluator = Evaluator(
                task=task,
                chat=chat,
                problems=sets,
                sampling=sampling,
                checker=checker,
                seed=seed,
                folder=cache / "samples",
                make_trainer=trainers.make,
            )
            return Evaluation(figures=evaluator.evaluate(backend, asked.name), samples=evaluator.folder)


def compare(
    selector: Chosen,
    baseline: Chosen,
    problems: Pool | Rows = None,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    evaluation: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> Comparison:
    """Train the scoring student on both selections, with the same recipe and steps, and compare what they learned.

    problems: what to evaluate on, as for `evaluate`; None: the pool's own sets, or else the held-out loss alone.
    seeds: of training and sampling; three or more give intervals over seeds, too. Selections stay as they are.
    evaluation: settings for `evaluate`. recipe: settings of `sft.`, as for `train`.
    """
    pool = selector.pool
    problems = pool if problems is None and pool.task.prepare_evaluation(pool.cache) else problems
    if problems is None and not pool.task.held_out:
        raise LarkError(
            "problems=None and the pool has neither evaluation sets nor held-out problems, so there is nothing to "
            "compare by; name problems, or load_pool(..., held_out=.1)"
        )
    recipe.setdefault("steps", None)
    held_out: dict[str, list[float]] = {}
    found: dict[str, list[Evaluation]] = {}
    for seed in seeds:
        first = train(selector, seed=seed, device=device, **recipe)
        same = recipe | {"steps": first.facts["steps"]}
        students = {
            "before": selector.data.student,
            f"baseline: {baseline.rule.name}": train(baseline, seed=seed, device=device, **same),
            f"selector: {selector.rule.name}": first,
        }
        for name, one in students.items():
            start = first.facts["held_out"].get("start", {})
            loss = one.held_out_loss if isinstance(one, TrainedStudent) else start.get("held_out/loss", np.nan)
            held_out.setdefault(name, []).append(loss)
            if problems is not None:
                made = evaluate(one, problems, seed=seed, device=device, cache=pool.cache, **evaluation or {})
                found.setdefault(name, []).append(made)
    return _compare(held_out, found)


def _to_student(student: Student | str | Path) -> Student:
    return student if isinstance(student, Student) else load_student(student)


def _compare(held_out: Mapping[str, list[float]], found: Mapping[str, list[Evaluation]]) -> Comparison:
    """Compare the students of each name (before, baseline, selector), a list over seeds."""
    table = pd.DataFrame({"held-out loss": {name: float(np.mean(losses)) for name, losses in held_out.items()}})
    differences = {}
    _, baseline, selector = held_out
    for of_set, metrics in (found[selector][0].metrics if found else {}).items():
        by_arm = {name: [one.average_by_problem(of_set) for one in made] for name, made in found.items()}
        keys = sorted(by_arm[selector][0])
        value_SP = {name: np.array([[one[key] for key in keys] for one in made]) for name, made in by_arm.items()}
        table[f"{of_set} avg@{metrics['samples']}"] = {name: float(x_SP.mean()) for name, x_SP in value_SP.items()}
        differences[of_set] = compute_paired_difference(value_SP[selector], value_SP[baseline])
    return Comparison(table=table, differences=differences)
