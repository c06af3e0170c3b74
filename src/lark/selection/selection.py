"""Rules (filter, score, policy) -> Selection: which rows, with which weights, and how that came about."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import atomic_write, write_json
from lark.common.errors import LarkError
from lark.common.groups import Groups, tie_hash
from lark.scoring.passes import Pass, needs_of
from lark.selection.candidates import Candidates
from lark.selection.matching import take_tokens, take_top
from lark.selection.policies import Policy, prior_weights, weights
from lark.selection.scores.statistics import Score, imported, needs_of_column
from lark.selection.within_problem import compute_spearman


@dataclass(frozen=True, kw_only=True)
class Between:
    """A filter: min <= value <= max; what has no value does not pass.

    The value is a `column`, that is a statistic (num_tokens, loss) or a numeric column of the pool, or a `score` of all
    candidates: exactly one of both.
    """

    column: str | None = None
    score: Score | None = None
    min: float = -np.inf
    max: float = np.inf

    def __post_init__(self) -> None:
        if (self.column is None) == (self.score is None):
            raise LarkError(
                f"selector.filter.column={self.column} and selector.filter.score={self.score} are "
                f"{'neither' if self.column is None else 'both'} set; set one of them"
            )
        if not (self.score is None or callable(self.score)):
            raise LarkError(
                f"selector.filter.score={self.score!r} is no score; set _target_ to one of lark.selection.scores.statistics"
            )
        if not self.min <= self.max:
            raise LarkError(f"selector.filter.min={self.min} is above selector.filter.max={self.max}; exchange them")

    @property
    def needs(self) -> tuple[Pass, ...]:
        return needs_of(self.score) if self.column is None else needs_of_column(self.column)

    def __call__(self, candidates: Candidates) -> np.ndarray:
        if self.column is None:
            assert self.score is not None
            values_N = _numbers(self.score(candidates), len(candidates), f"selector.filter.score={self.score}")
        else:
            values_N = _numbers(candidates[self.column], len(candidates), f"selector.filter.column={self.column}")
        return (values_N >= self.min) & (values_N <= self.max)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How to choose. Higher score = first.

    score: a score (lark.selection.scores.statistics) or `module:function`, called with the Candidates, giving one number a row.
    policy: turns the scores of one problem's candidates into weights; replaced by top_b when the rule is a baseline.
    filter: null, a boolean column of the pool (`correct`), a Between, or `module:function` giving a mask. It acts
        before scoring, so scores that depend on the other candidates are computed on the survivors.
    """

    name: str
    score: Score | str
    policy: Policy
    filter: Callable[[Candidates], np.ndarray] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", imported(self.score, "selector.score"))
        if isinstance(self.filter, str) and ":" in self.filter:
            object.__setattr__(self, "filter", imported(self.filter, "selector.filter"))
        if not callable(self.score):
            raise LarkError(f"selector.score={self.score!r} is no score; set a score or module:function")
        if not (self.filter is None or isinstance(self.filter, str) or callable(self.filter)):
            raise LarkError(f"selector.filter={self.filter!r} is no filter; set null, a column or module:function")

    @property
    def takes_all(self) -> bool:
        return self.policy.kind == "prior"

    @property
    def needs(self) -> tuple[Pass, ...]:
        """The passes that score, filter and prior need; a column of the pool needs none."""
        asked = [*needs_of(self.score), *needs_of_column(self.policy.prior)]
        if self.filter is not None:
            asked += needs_of_column(self.filter) if isinstance(self.filter, str) else needs_of(self.filter)
        return tuple(dict.fromkeys(asked))

    @property
    def columns(self) -> list[str]:
        """Columns of the pool that the rule names in its settings."""
        prior = {"uniform": None, "per_teacher": "teacher"}.get(self.policy.prior, self.policy.prior)
        filtered = [self.filter] if isinstance(self.filter, str) else [getattr(self.filter, "column", None)]
        scores = (self.score, getattr(self.filter, "score", None))
        named = [prior, *filtered, *(getattr(score, of, None) for score in scores for of in ("column", "subtask"))]
        return [name for name in named if name is not None and name != "num_tokens" and not needs_of_column(name)]

    def keep(self, candidates: Candidates) -> np.ndarray:
        """Mask [N] of the candidates the filter lets through; a missing value does not pass."""
        if self.filter is None:
            return np.ones(len(candidates), bool)
        with _errors_of(self.filter, f"the filter of selector {self.name}"):
            values = candidates[self.filter] if isinstance(self.filter, str) else self.filter(candidates)
        pass_N = _numbers(values, len(candidates), f"the filter of selector {self.name}")
        other_N = ~(np.isnan(pass_N) | (pass_N == 0) | (pass_N == 1))
        if other_N.any():
            raise LarkError(
                f"the filter of selector {self.name} must be true, false or missing, but is {pass_N[other_N][0]} for a "
                "row; set a boolean column, or lark.selection.selection.Between for a numeric one"
            )
        return pass_N == 1

    def scores(self, candidates: Candidates) -> np.ndarray:
        """Scores [N] in float64 of candidates that passed the filter."""
        assert callable(self.score)
        with _errors_of(self.score, f"the score of selector {self.name}"):
            values = self.score(candidates)
        score_N = _numbers(values, len(candidates), f"the score of selector {self.name}")
        if np.isposinf(score_N).any():
            raise LarkError(f"the score of selector {self.name} is +inf for some rows; return finite numbers or NaN")
        return score_N


@contextmanager
def _errors_of(called: Any, what: str) -> Iterator[None]:
    """What a function of the user's own raises becomes a ValueError that says where; what ours raise passes."""
    try:
        yield
    except Exception as error:
        module = getattr(called, "__module__", None) or ""  # of a function, or of an object's class
        if isinstance(called, str) or module.startswith("lark."):
            raise
        source = getattr(sys.modules.get(module), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
        where = f" ({Path(source).name}, line {lines[-1]})" if source and lines else ""
        text = f"{what} raised {type(error).__name__}{where}: {error}"
        raise LarkError(f"{text} (correct it; HYDRA_FULL_ERROR=1 shows the traceback)") from error


def _numbers(values: Any, rows: int, what: str) -> np.ndarray:
    """`values` as float64 [N], None as NaN; `what` names them in the error if they are no such thing."""
    if values is None:
        raise LarkError(f"{what} is None for {rows} candidates; return one number a row")
    try:
        array = np.asarray(values)
        if array.shape == (rows,):
            return array.astype(np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise LarkError(f"{what} is not one number for each of {rows} candidates ({error})") from error
    raise LarkError(f"{what} has shape {array.shape} for {rows} candidates; return one number a row")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen rows of the pool, with their weights.

    row: row numbers in the pool, ascending; share: q, sums to 1 within a problem; weight: q scaled so that its mean
    over the selection is 1; score: what the rule gave each chosen row; record: counts, shares, confounds (JSON);
    score_N: the scores of all candidates, NaN where there is none.
    """

    row: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    score: np.ndarray
    record: dict[str, Any]
    score_N: np.ndarray
    taken_by_problem: Mapping[str, int]


@contextmanager
def speaking_of(group: str) -> Iterator[None]:
    """Rules and their parts speak of `selector.<setting>`; an error of the rule of another group names that one's."""
    try:
        yield
    except ValueError as error:
        if group == "selector" or "selector." not in str(error):
            raise
        raise LarkError(str(error).replace("selector.", f"{group}.")) from error


def select(
    rule: Rule,
    candidates: Candidates,
    *,
    seed: int,
    like: Selection | None = None,
    match: str = "trajectories",
    trained_tokens_N: np.ndarray | None = None,
) -> Selection:
    """Apply `rule`; with `like` it acts as that selection's baseline: policy top_b with equal weights, taking of each
    problem as many rows as `like` took there or, with match="tokens", then more or fewer until the tokens are as many
    (a rule that takes all candidates still takes all). `trained_tokens_N` counts the tokens that training a row means;
    by default the candidates' own num_tokens.

    Raises LarkError when nothing at all can be chosen.
    """
    tokens_N = candidates["num_tokens"] if trained_tokens_N is None else trained_tokens_N
    if like is not None:
        candidates = candidates.as_baseline_for(like)
    keep_N = rule.keep(candidates)
    survivors = candidates.where(keep_N)
    score_N = np.full(len(candidates), np.nan)
    if len(survivors):
        score_N[keep_N] = rule.scores(survivors)
    groups = candidates.groups
    tie_N = tie_hash(seed, candidates["problem_id"], candidates["candidate_id"])
    valid_N = np.isfinite(score_N)
    counts: dict[str, int] = {
        "candidates": len(candidates),
        "dropped_by_filter": int((~keep_N).sum()),
        "dropped_without_score": int((keep_N & ~valid_N).sum()),
    }
    if like is not None and not rule.takes_all:
        first_of_group = candidates["problem_id"][np.unique(groups.index_N, return_index=True)[1]]
        wanted_G = np.array([like.taken_by_problem.get(problem, 0) for problem in first_of_group])
        details: dict[str, Any] = {"kind": "top_b", "match": match}
        if match == "tokens":
            total = like.record["tokens"]
            q_N, difference = take_tokens(score_N, groups, tie_N, wanted_G, tokens_N, total)
            details["tokens_minus_selector"] = difference
        else:
            q_N, counts["short_of_selector"] = take_top(score_N, groups, tie_N, wanted_G)
    else:
        column = None if rule.policy.prior == "uniform" else candidates[_prior_column(rule.policy)]
        prior_N = prior_weights(rule.policy.prior, column, groups, valid_N)
        result = weights(rule.policy, score_N, groups, tie_N, prior_N, seed=seed, problem_ids=candidates["problem_id"])
        q_N = result.q_N
        details = {**vars(rule.policy), **result.record()}
    chosen_N = np.flatnonzero(q_N > 0)
    if len(chosen_N) == 0:
        raise LarkError(
            f"selector {rule.name} chose nothing of {len(candidates)} candidates ({counts['dropped_by_filter']} "
            f"filtered, {counts['dropped_without_score']} without a score); loosen selector.filter or check the scores"
        )
    share = q_N[chosen_N]
    problems, taken = np.unique(candidates["problem_id"][chosen_N], return_counts=True)
    weight = share * len(share) / share.sum()
    counts |= {
        "chosen": len(chosen_N),
        "not_chosen": int(valid_N.sum()) - len(chosen_N),
        "problems": groups.count,
        "problems_without_choice": groups.count - len(problems),
    }
    decide = getattr(rule.score, "decisions", None)  # what a score chose by itself, such as an order of teachers
    record = {
        "rule": rule.name,
        "decisions": decide(survivors) if decide and len(survivors) else {},
        "matched": like is None or (not rule.takes_all and _is_matched(counts, details, tokens_N)),
        "policy": details,
        "counts": counts,
        "tokens": int(tokens_N[chosen_N].sum()),
        "effective_sample_size": float(weight.sum() ** 2 / np.square(weight).sum()),
        "teacher_share": _shares(candidates["teacher"][chosen_N], weight),
        "within_problem_spearman": {
            name: within_problem_spearman(score_N, candidates[name], groups)
            for name in ("loss", "num_tokens")
            if name in candidates.statistics  # a rule that needs no forward pass has none
        },
    }
    return Selection(
        row=candidates.row_N[chosen_N],
        share=share,
        weight=weight,
        score=score_N[chosen_N],
        record=record,
        score_N=score_N,
        taken_by_problem=dict(zip(problems.tolist(), taken.tolist(), strict=True)),
    )


def _is_matched(counts: dict[str, int], details: dict[str, Any], tokens_N: np.ndarray) -> bool:
    """Whether a baseline has as many rows, or tokens to within a row, as the selector: its rule may score too few."""
    if details["match"] == "tokens":
        return abs(details["tokens_minus_selector"]) <= int(tokens_N.max())
    return counts["short_of_selector"] == 0


def _prior_column(policy: Policy) -> str:
    return "teacher" if policy.prior == "per_teacher" else policy.prior


def _shares(teachers: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Share of the selection's weight by teacher, largest first."""
    names, index = np.unique([str(t) for t in teachers], return_inverse=True)
    share = np.bincount(index, weight) / weight.sum()
    return {str(names[i]): float(share[i]) for i in np.argsort(-share)}


def within_problem_spearman(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> float | None:
    """Mean over problems of Spearman's correlation between a and b among the problem's candidates (midranks for
    ties); problems in which either is constant, or fewer than two rows have both values, do not count. None if none.
    """
    rho_G = compute_spearman(a_N, b_N, groups).value_G
    return float(np.nanmean(rho_G)) if np.isfinite(rho_G).any() else None


_TYPES_SETTLED = 8 << 20
"""Bytes. datasets, with which other trainers read selection.jsonl, takes its types from the first 10 MB."""

_DATASET_INFO = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {  # all of them: a tag that is left out is none at all
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "observation",
        "function_tag": "function_call",
    },
}


def export(selection: Selection, read_rows: Callable[[np.ndarray], Any], path: Path, *, name: str) -> None:
    """Write selection.jsonl: one chosen row a line, `messages`, `weight` and `meta`, as TRL loads it; and beside it
    dataset_info.json, by which LLaMA-Factory does (dataset_dir: the folder, dataset: the file's name up to the dot).

    `read_rows` gives an iterable of pool rows for row numbers, so that the pool is never whole in memory. Lines follow
    the pool, but for a field of `meta` that has its first value far down: that line goes to the top.
    """
    valued: set[str] = set()
    late: set[int] = set()
    written = 0
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            rows = zip(read_rows(selection.row), selection.weight, selection.share, selection.score, strict=True)
            for i, (row, weight, share, score) in enumerate(rows):
                meta = {
                    "problem_id": row["problem_id"],
                    "candidate_id": row["candidate_id"],
                    "teacher": row["teacher"],
                    "answer": row["answer"],
                    "correct": row["correct"],
                    "rule": name,
                    "score": float(score),
                    "share": float(share),
                }
                line = {"messages": row["messages"], "weight": float(weight), "meta": meta}
                found = {key for key, value in meta.items() if value is not None} - valued
                if found and written > _TYPES_SETTLED:
                    late.add(i)
                valued |= found
                written += file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if late:
            _move_up(temporary, late)
    write_json(path.with_name("dataset_info.json"), {path.stem: {"file_name": path.name, **_DATASET_INFO}})


def _move_up(path: Path, lines: set[int]) -> None:
    """Puts the lines of these numbers first."""
    with atomic_write(path) as temporary, open(path, "rb") as source, open(temporary, "wb") as target:
        for moved in (True, False):
            source.seek(0)
            target.writelines(line for i, line in enumerate(source) if (i in lines) == moved)
