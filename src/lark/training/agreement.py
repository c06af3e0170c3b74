"""Whether bfloat16 chooses what float32 would: what model.dtype=auto rests on, measured on a few problems of the pool.

The student is asked for the statistics of the same candidates in both dtypes, one after the other, by the probe's own
code; then the scores of the run's rules are compared, problem by problem. It decides in what the student's passes run.
Training and sampling do not follow: an arm must not depend on the rules it happens to be compared with.

Shapes: N candidates, G problems.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lark.common.cache import complete, identity_hash, read_json
from lark.common.errors import LarkError
from lark.common.groups import Groups, tie_hash, unit_hash
from lark.common.ranks import Plan, is_main
from lark.scoring.passes import Statistics
from lark.scoring.statistics_pass import ProbeModule, Work, measure
from lark.scoring.table_cache import COST_COLUMNS, read_statistics
from lark.selection.candidates import Candidates
from lark.selection.policies import Policy
from lark.selection.scores.statistics import Lark, Likelihood
from lark.selection.selection import Rule, speaking_of, within_problem_spearman
from lark.student.memory import is_out_of_memory
from lark.student.student import Student
from lark.training.datamodule import TrajectoryDataModule

PROBLEMS = 32
LEAST = 0.95  # share of the top-B sets that must be the same
STAND_INS = tuple(
    Rule(name=name, score=score, policy=Policy(kind="top_b", budget=1))
    for name, score in (("lark", Lark()), ("likelihood", Likelihood()))
)
"""What stands for a rule that needs other passes: to run those in float32 too could cost more than the run itself."""

Claim = Callable[[str, Path, Callable[[], bool]], AbstractContextManager[bool]]
"""Of (name, folder, is it done?): whether the work is to be done here, under a lock until the block ends."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two scores of the same candidates.

    problems: those with more candidates than the budget, so that there is a choice; same: those of them whose top-B
    sets are equal; changed: share of the first score's top-B rows that are not in the second's (None: no problems);
    spearman: mean rank correlation within these problems (None: no two ranks to compare).
    """

    problems: int
    same: int
    changed: float | None
    spearman: float | None

    @property
    def share(self) -> float:
        """Of the problems with equal sets, 1 where there are none."""
        return self.same / self.problems if self.problems else 1.0


def agreement(a_N: np.ndarray, b_N: np.ndarray, groups: Groups, tie_N: np.ndarray, *, budget: int) -> Agreement:
    """Compare the `budget` best rows of every group by score a with those by score b (NaN: never; ties by `tie_N`)."""
    choice_G = groups.sum((np.isfinite(a_N) | np.isfinite(b_N)).astype(float)) > budget
    choice_N = groups.spread(choice_G)
    a_N, b_N = (np.where(choice_N, score_N, np.nan) for score_N in (a_N, b_N))
    top_a_N, top_b_N = (_top(score_N, groups, tie_N, budget) for score_N in (a_N, b_N))
    differs_G = groups.sum((top_a_N != top_b_N).astype(float)) > 0
    return Agreement(
        problems=int(choice_G.sum()),
        same=int((choice_G & ~differs_G).sum()),
        changed=float((top_a_N & ~top_b_N).sum() / top_a_N.sum()) if top_a_N.any() else None,
        spearman=within_problem_spearman(a_N, b_N, groups),
    )


def _top(score_N: np.ndarray, groups: Groups, tie_N: np.ndarray, budget: int) -> np.ndarray:
    ranking = groups.rank(score_N, tie_N, np.isfinite(score_N))
    top_N = np.zeros(len(score_N), bool)
    top_N[ranking.row_M[ranking.position < budget]] = True
    return top_N


def sample_rows(problem_id_N: np.ndarray, *, budget: int, problems: int = PROBLEMS) -> np.ndarray:
    """Rows, ascending, of `problems` whole problems with more than `budget` candidates, chosen by hash of their id."""
    groups = Groups.from_ids(problem_id_N)
    ids = np.array(list(dict.fromkeys(problem_id_N.tolist())), object)
    choice = np.flatnonzero(groups.size > budget)
    draw = unit_hash(0, ids[choice], ["problem"] * len(choice), salt="agreement")
    return np.flatnonzero(np.isin(groups.index_N, choice[np.argsort(draw)[:problems]]))


@contextmanager
def unclaimed(name: str, folder: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """The `Claim` of a process that works alone."""
    yield not done()


def statistics_in(dtype: str, data: TrajectoryDataModule, row_N: np.ndarray, claim: Claim = unclaimed) -> Path:
    """The cache folder with the statistics of these rows of the pool, the student in `dtype` (all ranks take part)."""
    work = Work(
        student=replace(data.scorer, dtype=dtype),
        probe=data.probe,
        pool=data.scored_trajectories,
        rows=row_N,
        seed=data.seed,
    )
    device = data.make_trainer("").strategy.root_device.type
    identity = {**data.pass_identity(Statistics(), work), "device": device}
    folder = data.cache / "agreement" / identity_hash(identity)
    with claim(f"agreement {dtype}", folder, partial(complete, folder)) as to_do:
        if to_do:
            module = ProbeModule(wanted=Statistics(), work=work, folder=folder)
            try:
                measure(data.make_trainer(dtype), module, identity)
            except RuntimeError as error:
                if dtype != "float32" or not is_out_of_memory(error):
                    raise
                raise LarkError(
                    f"model.dtype=auto compares bfloat16 with float32, but in float32 {data.scorer.name} does not fit "
                    "the device; set model.dtype=bfloat16, or lower probe.batch_tokens"
                ) from error
            module.student_model = None  # whatever still refers to the module must not keep a second student
    return folder


def candidates_of(folder: Path, data: TrajectoryDataModule) -> Candidates:
    """The candidates whose statistics `folder` holds."""
    columns, pool = read_statistics(folder), data.trajectories
    row_N = columns["row"]
    return Candidates(
        problem_id=pool.problem_id[row_N],
        candidate_id=pool.candidate_id[row_N],
        statistics=columns.without("row"),
        read_column=pool.column,
        row_N=row_N,
    )


def compare(rule: Rule, a: Candidates, b: Candidates, *, seed: int, budget: int) -> Agreement:
    """What `rule` makes of the same candidates with two sets of statistics."""
    tie_N = tie_hash(seed, a.problem_id, a.candidate_id)
    return agreement(_scores(rule, a), _scores(rule, b), a.groups, tie_N, budget=budget)


def _scores(rule: Rule, candidates: Candidates) -> np.ndarray:
    """[N], NaN where the filter lets nothing through."""
    keep_N = rule.keep(candidates)
    score_N = np.full(len(candidates), np.nan)
    if keep_N.any():
        score_N[keep_N] = rule.scores(candidates.where(keep_N))
    return score_N


def is_open(student: Student, device: torch.device) -> bool:
    """Whether the dtype of the student's passes is to be found out: on a CPU, auto is float32 and nothing is gained."""
    return student.dtype == "auto" and device.type != "cpu"


def settle_dtype(data: TrajectoryDataModule, claim: Claim, plan: Plan) -> None:
    """Find out what model.dtype=auto means for the passes on this device, if it is open (all ranks take part).

    Raises LarkError if the student does not fit the device in float32.
    """
    if is_open(data.scorer, data.make_trainer("").strategy.root_device):
        choose_dtype(data, claim, plan)


def choose_dtype(data: TrajectoryDataModule, claim: Claim, plan: Plan, *, least: float = LEAST) -> None:
    """bfloat16 if by every rule that reads the statistics at least `least` of the top-B sets are those of float32, else
    float32. `data.asked` becomes the student in that dtype, `data.agreement` says how it came about (JSON).

    B is the selector's budget, else the baseline's, else 1. Where nothing can be compared bfloat16 stays.
    """
    rules = _compared(data.rules)
    budget = next((rule.policy.budget for rule in data.rules.values() if rule.policy.budget is not None), 1)
    row_N = data.scored[sample_rows(data.trajectories.problem_id[data.scored], budget=budget)]
    compared = ("float32", "bfloat16") if rules and len(row_N) else ()
    folders = [statistics_in(dtype, data, row_N, claim) for dtype in compared]
    found: dict[str, Any] = {}
    if is_main():
        found = {"passes": "bfloat16", "budget": budget, "least": least, "rules": {}, "cost": {}}
        if folders:
            a, b = (candidates_of(folder, data) for folder in folders)
            results: dict[str, Agreement] = {}
            for title, (role, rule) in rules.items():
                with speaking_of(role):
                    results[title] = compare(rule, a, b, seed=data.seed, budget=budget)
            costs = [read_json(folder / "manifest.json") for folder in folders]
            found["rules"] = {title: {**asdict(one), "share": one.share} for title, one in results.items()}
            found["cost"] = {name: sum(cost[name] for cost in costs) for name in COST_COLUMNS}
            if any(one.share < least for one in results.values()):
                found["passes"] = "float32"
    plan.share(dtype=found)
    data.agreement = plan["dtype"]
    data.asked = replace(data.scorer, dtype=data.agreement["passes"])
    data.say(describe(data.agreement, reads=bool(rules)))


def _compared(rules: Mapping[str, Rule]) -> dict[str, tuple[str, Rule]]:
    """What is compared, by name, and whose it is (selector or baseline): rules as they are if the statistics are all
    they need, or their stand-ins.
    """
    by_name: dict[str, tuple[str, Rule]] = {}
    for role, rule in rules.items():
        if not rule.needs:
            continue
        for one in (rule,) if rule.needs == (Statistics(),) else STAND_INS:
            _, first = by_name.setdefault(one.name, (role, one))
            if (first.score, first.filter) != (one.score, one.filter):
                by_name[f"{one.name} ({role})"] = (role, one)
    return by_name


def describe(found: Mapping[str, Any], *, reads: bool) -> str:
    """The choice in a line; `reads`: whether any rule reads what the student is asked for."""
    budget, least = found["budget"], found["least"]
    what = "no problem has more candidates than the budget" if reads else "no rule reads the student's statistics"
    figures = [
        f"{one['same']:,} of {one['problems']:,} top-{budget} sets of {title} as in float32 ({one['share']:.0%}"
        + (f", less than {least:.0%}" if one["share"] < least else "")
        + f"), rank correlation {_number(one['spearman'])}"
        for title, one in found["rules"].items()
    ]
    compared = "; ".join(figures) if figures else f"nothing to compare with float32, {what}"
    return f"dtype       {found['passes']}: {'in bfloat16 ' if found['passes'] == 'float32' else ''}{compared}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
