"""Which rules a race has to leave as they are: what each takes of a problem, and what makes it unfit for racing.

Shapes: N candidates.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.scoring.passes import Statistics, needs_of
from lark.selection.candidates import Candidates
from lark.selection.scores.statistics import Lark, Learnability, Likelihood, RankSurprisal, needs_of_column
from lark.selection.selection import Rule

RACED = (Lark, Learnability, Likelihood, RankSurprisal)
OUT_OF_RACE = "set probe.race=false"


@dataclass(frozen=True, kw_only=True, eq=False)
class Contest:
    """A rule whose choice the race has to leave as it is: the `budget` best are chosen, and the `places` best have to
    come out exact (one more where the weights are measured from the best one excluded). `name`: selector or baseline.

    Where there are two contests, a candidate is given up only if it is beaten in both.
    """

    name: str
    rule: Rule
    places: int
    budget: int

    def identity(self, enters_N: np.ndarray) -> dict[str, Any]:
        """What the race depends on of it; `enters_N` are the candidates that pass its filter."""
        score = self.rule.score
        mask = None if self.rule.filter is None else hashlib.sha256(enters_N.tobytes()).hexdigest()
        return {
            "score": [type(score).__name__, vars(score)],
            "places": self.places,
            "budget": self.budget,
            "enters": mask,
        }


def contests(rules: Mapping[str, Rule], *, match: str) -> tuple[Contest, ...]:
    """The rules among the selector and its baseline that read the statistics, as contests.

    Raises LarkError for a rule that cannot be raced, and where there is none.
    """
    found = []
    for name, rule in rules.items():
        if Statistics() not in rule.needs:
            continue
        _check(name, rule)
        policy = rules["selector"].policy  # a baseline takes as many as the selector did
        if policy.budget is None or rule.takes_all or (policy.kind == "sample" and policy.tau is not None):
            raise LarkError(
                f"{name}={rule.name} cannot be raced: with selector.policy.kind={policy.kind}, "
                f"budget={policy.budget} and tau={policy.tau} it may take any number of a problem's candidates; "
                f"set a budget alone, or {OUT_OF_RACE}"
            )
        if name == "baseline" and match != "trajectories":
            raise LarkError(
                f"baseline={rule.name} cannot be raced: with match={match} it may take any number of a problem's "
                f"candidates; set match=trajectories, or {OUT_OF_RACE}"
            )
        excluded = name == "selector" and policy.kind in ("chi2", "kl", "sample") and policy.tau is None
        found.append(Contest(name=name, rule=rule, places=policy.budget + excluded, budget=policy.budget))
    if not found:
        raise LarkError(f"probe.race=true, but no rule chooses by the student's statistics; {OUT_OF_RACE}")
    return tuple(found)


def _check(name: str, rule: Rule) -> None:
    if not isinstance(rule.score, RACED):
        raise LarkError(
            f"{name}={rule.name} reads the student's statistics, but only lark, lark_length, rho_length, rsr, "
            f"likelihood and perplexity_high can be raced; {OUT_OF_RACE}"
        )
    asks = needs_of_column if isinstance(rule.filter, str) else needs_of
    if rule.filter is not None and asks(rule.filter):  # type: ignore[arg-type]
        raise LarkError(
            f"{name}={rule.name} cannot be raced: its filter reads what only whole passes give; set {name}.filter to a "
            f"column of the pool or null, or {OUT_OF_RACE}"
        )
    if rule.policy.prior not in ("uniform", "per_teacher"):
        raise LarkError(
            f"{name}={rule.name} cannot be raced: {name}.policy.prior={rule.policy.prior} may exclude the best; set it "
            f"to uniform or per_teacher, or {OUT_OF_RACE}"
        )


def clips(of: Sequence[Contest]) -> tuple[int | None, ...]:
    """The rank clips that the contests need, ascending, None (no clip) last."""
    found = {contest.rule.score.clip for contest in of if isinstance(contest.rule.score, RankSurprisal)}
    return tuple(sorted(found, key=lambda clip: math.inf if clip is None else clip))


def raced(rule: Rule) -> Rule:
    """The rule as it chooses after its race: candidates that were given up have no score."""
    return replace(rule, score=_Raced(rule.score))


class _Raced:
    def __init__(self, score: Any):
        self.score, self.needs = score, score.needs

    def __call__(self, candidates: Candidates) -> np.ndarray:
        score_N = self.score(candidates)
        return np.where(candidates["stopped"], np.nan, score_N) if "stopped" in candidates.statistics else score_N

    def __repr__(self) -> str:
        return repr(self.score)
