"""The statistics by a race: a problem's candidates side by side through the student, on caches of keys and values.

Two passes. The first scores a few problems in full, for the judge to learn from (lark.selection.judge); the second races all
others, problem by problem. A candidate that was given up has `stopped` = true, the number of span tokens that were read
of it, and estimates of its sums of surprisal and Brier score, on which the scores of the others may rest. What else is
not known of it is null, and no rule that was raced can choose it.

Shapes: K candidates of a problem, R of them running, W tokens of a chunk, T span tokens of a candidate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lark.common.cache import complete, read_json, write_json
from lark.common.errors import LarkError
from lark.common.groups import Groups, unit_hash
from lark.common.ranks import is_main
from lark.scoring.passes import Pass
from lark.scoring.statistics_pass import STEP_COLUMNS, TOKEN_COLUMNS, PassModule, Work, measure, table_rows
from lark.scoring.table_cache import COST_COLUMNS, read_columns
from lark.selection.candidates import Candidates
from lark.selection.contests import Contest
from lark.selection.judge import Heat, Judge, Problem
from lark.selection.race import calibration_size, cuts
from lark.student.batching import collate
from lark.student.chat import Encoded
from lark.student.student import base_model, head_of, hidden_states
from lark.student.token_statistics import TokenStatistics, token_statistics, trajectory_sums

LEAST_CHUNK = 32  # tokens; a shorter one is not cut off for a candidate that ends
CALIBRATION = ("calibration_surprisal", "calibration_brier", "calibration_rank")
"""Columns of the calibration's table: what the judge learns from, a value a token."""
REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # one entry a token; others hold a state of all tokens so far
KNOWN = ("row", "num_tokens", "sum_surprisal", "sum_brier", "stopped", "read_tokens", *COST_COLUMNS)
"""Columns of a candidate that was given up which are not null; steps and tokens are NaN where they were not read."""
_FIELDS = tuple(TokenStatistics.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class RaceWork(Work):
    """`contests`: the rules whose choice the race has to leave as it is."""

    contests: tuple[Contest, ...]

    @cached_property
    def enters(self) -> dict[Contest, np.ndarray]:
        """Which rows pass each contest's filter, [N]."""
        rows, pool = self.rows, self.pool
        candidates = Candidates(
            problem_id=pool.problem_id[rows],
            candidate_id=pool.candidate_id[rows],
            row_N=rows,
            statistics={"num_tokens": pool.span_tokens[rows]},
            read_column=pool.column,
        )
        return {contest: contest.rule.keep(candidates) for contest in self.contests}

    @cached_property
    def calibration(self) -> np.ndarray:
        """Rows of whole problems, drawn by hash from those where a contest has more candidates than places."""
        groups = Groups.from_ids(self.pool.problem_id[self.rows])
        contested_G = np.zeros(groups.count, bool)
        for contest, enters_N in self.enters.items():
            contested_G |= groups.sum(enters_N * 1.0) > contest.places
        contested = np.flatnonzero(contested_G)
        ids = np.array(list(dict.fromkeys(self.pool.problem_id[self.rows].tolist())), object)[contested]
        drawn = np.argsort(unit_hash(0, ids, ["problem"] * len(ids), salt="race"), kind="stable")
        count = calibration_size(len(contested), self.probe.race_confidence)
        return self.rows[np.isin(groups.index_N, contested[drawn[:count]])]

    def problem(self, rows: np.ndarray, encoded: Sequence[Encoded]) -> Problem:
        place = np.searchsorted(self.rows, rows)
        assert np.array_equal(self.rows[place], rows)
        return Problem.of(encoded, {contest: enters_N[place] for contest, enters_N in self.enters.items()})


class Runner:
    """The candidates of one problem on their way through the student. What they begin with is read once; from there on
    the student has read the first `at` tokens of each that is still running.
    """

    def __init__(self, model: Any, encoded: Sequence[Encoded], *, budget: int, **settings: Any):
        base = base_model(model)
        self.decoder: Any = base.get_decoder()
        self.head, self.device = head_of(model), next(base.parameters()).device
        self.budget, self.settings = budget, settings
        self.ids = [torch.tensor(row.input_ids) for row in encoded]
        self.first_K = np.array([max(row.prompt_tokens, 1) for row in encoded])  # nothing predicts the very first token
        self.length_K = np.array([len(row.input_ids) for row in encoded])
        self.cache: Any = DynamicCache(config=base.config)
        self.running = np.arange(len(encoded))
        self.at = self.computed_tokens = 0
        self.pieces: list[list[torch.Tensor]] = [[] for _ in encoded]

    def leave(self, gone_K: np.ndarray) -> None:
        """Take candidates out."""
        stays_R = ~gone_K[self.running]
        if not stays_R.all():
            self.running = self.running[stays_R]
            if self.at and len(self.running):
                self.cache.batch_select_indices(torch.from_numpy(np.flatnonzero(stays_R)).to(self.device))

    def advance(self, tokens: int | None) -> None:
        """Read on until each candidate that runs has `tokens` span tokens scored (None: all), or is at its end."""
        if self.at == 0 and len(self.running):
            self._read_prompt()
        last_K = self.length_K - 1  # the last token itself predicts nothing that counts
        stop = int((last_K if tokens is None else self.first_K + tokens - 1).max())
        while len(self.running) and self.at < stop:
            left_R = last_K[self.running] - self.at
            width = min(stop - self.at, int(left_R.max()), max(int(left_R.min()), LEAST_CHUNK))
            self._read(min(width, max(1, self.budget // len(self.running))))
            self.leave(last_K <= self.at)

    def _read_prompt(self) -> None:
        """But for its last token: what that predicts is a candidate's own."""
        ids_KL = torch.stack([ids[: int(self.first_K.min()) - 1] for ids in self.ids])
        shared = int((ids_KL == ids_KL[:1]).all(0).long().cumprod(0).sum())
        while self.at < shared:
            chunk = ids_KL[:1, self.at : min(self.at + self.budget, shared)]
            self._forward(chunk)
            self.at += chunk.shape[1]
        if shared:
            self.cache.batch_repeat_interleave(len(self.running))

    def _read(self, width: int) -> None:
        ids_RW = torch.zeros(len(self.running), width, dtype=torch.int64)
        predict, target, owner, counts = [], [], [], []
        for r, k in enumerate(self.running.tolist()):
            stop = min(self.at + width, int(self.length_K[k]) - 1)
            ids_RW[r, : stop - self.at] = self.ids[k][self.at : stop]
            start = max(self.at, int(self.first_K[k]) - 1)
            if start < stop:
                predict.append(torch.arange(start, stop) - self.at + r * width)
                target.append(self.ids[k][start + 1 : stop + 1])
                owner.append(k)
                counts.append(stop - start)
        hidden_RWD = self._forward(ids_RW)
        self.at += width
        if predict:
            hidden_ND = hidden_RWD.flatten(0, 1)[torch.cat(predict).to(self.device)]
            values = token_statistics(hidden_ND, torch.cat(target).to(self.device), self.head, **self.settings)
            value_FN = torch.stack([getattr(values, field).float() for field in _FIELDS]).cpu().double()
            for k, piece in zip(owner, value_FN.split(counts, 1), strict=True):
                self.pieces[k].append(piece)

    def _forward(self, ids_RW: torch.Tensor) -> torch.Tensor:
        self.computed_tokens += ids_RW.numel()
        output = self.decoder(input_ids=ids_RW.to(self.device), past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state

    def scored(self, k: int) -> torch.Tensor:
        """Candidate k's token statistics so far, in the order of TokenStatistics' fields, float64 [5, T]."""
        return torch.cat([torch.zeros(len(_FIELDS), 0, dtype=torch.float64), *self.pieces[k]], 1)

    def values(self) -> list[np.ndarray]:
        """Surprisal, Brier score and rank of each candidate's tokens so far, float64 [T, 3]."""
        names = [_FIELDS.index(name) for name in ("surprisal_N", "brier_N", "rank_N")]
        return [self.scored(k)[names].T.numpy() for k in range(len(self.pieces))]


class RaceModule(PassModule):
    """Races every problem before the judge; those of the calibration are `known` already (columns by row)."""

    SPLITS = False  # a problem's candidates race together
    work: RaceWork

    def __init__(
        self,
        *,
        wanted: Pass,
        work: RaceWork,
        folder: Path,
        judge: Judge | None = None,
        known: Mapping[int, dict[str, Any]] | None = None,
    ):
        super().__init__(wanted=wanted, work=work, folder=folder)
        self.judge, self.known = judge, known or {}

    @classmethod
    def identity(cls, wanted: Pass, work: Work) -> dict[str, Any]:
        assert isinstance(work, RaceWork)
        contests = [contest.identity(enters_N) for contest, enters_N in work.enters.items()]
        return wanted.identity() | work.probe.identity() | {"contests": contests}

    @cached_property
    def runs_on_caches(self) -> bool:
        """Raises LarkError if not."""
        check_caches(self.student_model, self.work.student.name)
        return True

    def units(self) -> list[np.ndarray]:
        """Whole problems, the longest first."""
        _ = self.batch_tokens  # settled now, as all ranks take part in that
        rows, lengths = self.work.rows, self.work.pool.length
        problems = [rows[group] for group in Groups.from_ids(self.work.pool.problem_id[rows]).split()]
        return sorted(problems, key=lambda unit: -int(lengths[unit].sum()))

    def batch(self, rows: np.ndarray) -> Any:
        return rows, self.work.pool.encoded(rows)

    @torch.inference_mode()
    def measure(self, batch: tuple[np.ndarray, list[Encoded]]) -> list[dict[str, Any]]:
        rows, encoded = batch
        if int(rows[0]) in self.known:
            return [self.known[row] for row in rows.tolist()]
        _ = self.runs_on_caches
        runner = Runner(
            self.student_model,
            encoded,
            budget=self.batch_tokens,
            top_k=self.work.probe.top_k,
            compiled=self.not_compiled is None,
        )
        if self.judge is None or not self.judge.gives_up:
            runner.advance(None)
            return self._columns(rows, encoded, runner, None)
        heat = Heat(self.judge, self.work.problem(rows, encoded))
        for cut in cuts(int(heat.problem.tokens_K.max())):
            if cut:
                runner.advance(cut)
            runner.leave(heat.give_up(runner.values()))
            if heat.settled or not len(runner.running):
                break
        runner.advance(None)
        return self._columns(rows, encoded, runner, heat)

    def _columns(
        self, rows: np.ndarray, encoded: list[Encoded], runner: Runner, heat: Heat | None
    ) -> list[dict[str, Any]]:
        layout = collate(encoded, rows.tolist())
        scored = [runner.scored(k) for k in range(len(encoded))]
        span = np.bincount(layout.row_N.numpy(), minlength=len(encoded)).tolist()
        whole = [
            torch.nn.functional.pad(x, (0, n - x.shape[1]), value=torch.nan) for x, n in zip(scored, span, strict=True)
        ]
        columns = dict(zip(_FIELDS, torch.cat(whole, 1), strict=True))
        columns["rank_N"] = columns["rank_N"].nan_to_num(0).long()
        tokens = TokenStatistics(**columns)
        ends = torch.tensor([row.end_of_turn for row in encoded])
        sums = trajectory_sums(tokens, layout.row_N, layout.position_N, ends, rows=len(encoded))
        records = table_rows(layout, encoded, sums, tokens, self.work.probe)
        estimated = None if heat is None else heat.estimate(runner.values()).total_NC
        for k, record in enumerate(records):
            read = scored[k].shape[1]
            record["stopped"], record["read_tokens"] = read < span[k], read
            record["computed_tokens"] = runner.computed_tokens if k == 0 else 0
            if record["stopped"]:
                assert heat is not None and estimated is not None and heat.out_K[k]
                record["forward_tokens"] = int(runner.first_K[k]) + read if read else 0
                record["sum_surprisal"], record["sum_brier"] = estimated[k, :2].tolist()
                if "token_rank" in record:
                    record["token_rank"] = np.where(np.arange(span[k]) < read, record["token_rank"], np.nan)
                of_tokens = (*STEP_COLUMNS, *TOKEN_COLUMNS)
                record |= {name: None for name in record if name not in KNOWN and name not in of_tokens}
        return records


class CalibrationModule(RaceModule):
    """The problems that the judge learns from, in full, with what it wants to know of every token."""

    def _columns(
        self, rows: np.ndarray, encoded: list[Encoded], runner: Runner, heat: Heat | None
    ) -> list[dict[str, Any]]:
        records = super()._columns(rows, encoded, runner, heat)
        return [
            record | dict(zip(CALIBRATION, value_T3.T, strict=True))
            for record, value_T3 in zip(records, runner.values(), strict=True)
        ]


def race(
    wanted: Pass,
    work: RaceWork,
    folder: Path,
    identity: dict[str, Any],
    *,
    make_trainer: Callable[[str], Trainer],
    logger: Logger | None,
) -> None:
    """Both passes; completes the cache folder as lark.scoring.statistics_pass.measure does (all ranks take part). Its manifest has what
    the race came to under "race".
    """
    first, before, learnt = folder / "calibration", {}, {}
    if len(work.calibration):
        if not complete(first):
            module = CalibrationModule(wanted=wanted, work=replace(work, rows=work.calibration), folder=first)
            measure(make_trainer("calibration"), module, identity)
        before = {name: read_json(first / "manifest.json")[name] for name in COST_COLUMNS}
        learnt = dict(read_columns(first))
    judge = Judge(work.contests, list(_problems(work, learnt)), confidence=work.probe.race_confidence)
    trainer = make_trainer(wanted.name.replace("_", " "))
    trainer.logger = logger
    module = RaceModule(wanted=wanted, work=work, folder=folder, judge=judge, known=_records(learnt))
    measure(trainer, module, identity, before=before)
    if is_main():
        manifest = read_json(folder / "manifest.json")
        write_json(folder / "manifest.json", manifest | {"race": _outcome(folder, work, judge)})


def _problems(work: RaceWork, learnt: Mapping[str, np.ndarray]) -> Iterator[tuple[Problem, list[np.ndarray]]]:
    """The calibration's problems with the token statistics of their candidates, [T, 3] each."""
    if not learnt:
        return
    for group in Groups.from_ids(work.pool.problem_id[learnt["row"]]).split():
        rows = learnt["row"][group]
        values = [np.stack([learnt[name][i] for name in CALIBRATION], 1) for i in group.tolist()]
        yield work.problem(rows, work.pool.encoded(rows)), values


def _records(learnt: Mapping[str, np.ndarray]) -> dict[int, dict[str, Any]]:
    """The calibration's rows as the race's table has them, by row; what they cost is counted already."""
    kept = {name: list(column) for name, column in learnt.items() if name not in CALIBRATION}
    return {
        int(row): {name: column[i] for name, column in kept.items()} | {"forward_tokens": 0}
        for i, row in enumerate(kept.get("row", []))
    }


def _outcome(folder: Path, work: RaceWork, judge: Judge) -> dict[str, Any]:
    columns = read_columns(folder)
    return {
        "confidence": work.probe.race_confidence,
        "calibration_trajectories": len(work.calibration),
        "contests": judge.record,
        "stopped": int(columns["stopped"].sum()),
        "span_tokens": int(columns["num_tokens"].sum()),
        "read_tokens": int(columns["read_tokens"].sum()),
    }


def describe_race(manifest: Mapping[str, Any]) -> str:
    """What a race came to, in a line, from the manifest of its cache folder."""
    race, rows = manifest["race"], manifest["rows"]
    saved = race["span_tokens"] - race["read_tokens"]
    margins = ", ".join(
        f"{one['rule']} {'none' if one['margin'] is None else format(one['margin'], '.1f')}" for one in race["contests"]
    )
    return (
        f"race        confidence {race['confidence']:g}: {race['stopped']:,} of {rows:,} trajectories given up, "
        f"{saved:,} of {race['span_tokens']:,} span tokens saved ({saved / race['span_tokens']:.0%}); "
        f"{race['calibration_trajectories']:,} trajectories scored in full to learn from; margins {margins}"
    )


def check_caches(model: Any, name: str) -> None:
    """LarkError for a student that does not come to the same hidden states on caches that are repeated and cut."""
    decoder: Any = base_model(model).get_decoder()
    ids_RL = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [3, 1, 4, 2, 7, 1, 8], [3, 1, 4, 3, 5, 8, 9]])
    ids_RL = ids_RL.to(next(base_model(model).parameters()).device)
    remedy = f"model={name} cannot be raced ({{}}); set probe.race=false"
    with torch.inference_mode():
        whole_RD = hidden_states(model, ids_RL, None).view(3, 7, -1)[:, -1]
        cache: Any = DynamicCache(config=base_model(model).config)
        try:
            decoder(input_ids=ids_RL[:1, :3], past_key_values=cache, use_cache=True)
        except ValueError as error:  # by which transformers refuses a cache that is not of the student's own kind
            raise LarkError(remedy.format(f"its cache: {error}")) from error
        if others := {type(layer).__name__ for layer in cache.layers if type(layer) not in REPEATABLE}:
            raise LarkError(
                remedy.format(f"its cache holds {', '.join(sorted(others))}, which are not repeated and cut")
            )
        cache.batch_repeat_interleave(3)
        decoder(input_ids=ids_RL[:, 3:5], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([0, 2], device=ids_RL.device))
        raced_RD = decoder(input_ids=ids_RL[[0, 2], 5:], past_key_values=cache, use_cache=True).last_hidden_state
    difference = (raced_RD[:, -1] - whole_RD[[0, 2]]).abs().max().item()
    if not difference <= 0.05 * whole_RD.abs().max().item():
        raise LarkError(remedy.format(f"on its cache it computes something else, by {difference:.3g}"))
