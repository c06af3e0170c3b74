"""Measure what a run's own scores and selections are worth: `diagnostics=none|cheap|full`.

cheap   from the statistics and selections that are there anyway: correlations of all scores with loss, length and
        correctness (lark.diagnostics.correlations), what the selections are made of (lark.diagnostics.composition),
        loss curves (lark.diagnostics.curves)
full    also, on a sample of problems, exact gradients and real loss drops beside the proxies
        (lark.diagnostics.exact_gradients, lark.diagnostics.fidelity), and a student trained on each bin of the score
        (lark.diagnostics.quantile_bins)

<run>/diagnostics.json has every figure with its problems, chance value and interval, diagnostics-*.csv the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.ranks import Claim, is_main
from lark.diagnostics.correlations import describe_choice
from lark.diagnostics.curves import compare_curves
from lark.diagnostics.exact_gradients import ExactGradients, find_budget, measure_sample
from lark.diagnostics.fidelity import summarise_fidelity
from lark.diagnostics.quantile_bins import assign_bins, compute_trends, select_by_bin, summarise_bins
from lark.diagnostics.write import (
    flatten_figures,
    log_bins,
    log_curves,
    log_fidelity,
    log_selections,
    write_diagnostics,
    write_table,
)
from lark.scoring.passes import check_average, check_parameters
from lark.selection.candidates import Candidates
from lark.selection.selection import Selection
from lark.student.distributed import Parallelism
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule

LEVELS = ("none", "cheap", "full")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Measures scores and selections; what follows `resamples` is for `full` alone."""

    name: str = "cheap"
    """none | cheap | full"""
    resamples: int = 1000
    """Bootstrap resamples of problems for intervals."""
    problems: int = 40
    """Problems whose trajectories' gradients are taken, by hash of their id, of those with more candidates than the
    budget."""
    parameters: str = "trained"
    """trained | all | last:<n>: what the exact quantities are over."""
    average: str = "trajectory"
    """trajectory | token: the loss whose exact gain is measured."""
    eta: float = 1e-3
    """SGD step of the loss drops."""
    bins: int = 4
    """Bins of the score, each of which a student is trained on; 0: none."""

    def __post_init__(self) -> None:
        if self.name not in LEVELS:
            raise LarkError(f"diagnostics.name={self.name!r} is unknown; set it to one of {', '.join(LEVELS)}")
        if self.resamples < 100:
            raise LarkError(f"diagnostics.resamples={self.resamples} is too few for intervals; set at least 100")
        if self.problems < 1:
            raise LarkError(f"diagnostics.problems={self.problems} leaves nothing to sample; set it to at least 1")
        check_parameters(self.parameters, "diagnostics.parameters")
        check_average(self.average, "diagnostics.average")
        if not self.eta > 0:
            raise LarkError(f"diagnostics.eta={self.eta} is not a step; set it above 0, for example 1e-3")
        if self.bins < 0 or self.bins == 1:
            raise LarkError(f"diagnostics.bins={self.bins} compares nothing; set it to 2 or more, or 0 for none")


class Diagnosis:
    """The diagnostics of one run as they come together. All ranks call its methods, in their order; rank 0 writes.

    `found` is what diagnostics.json holds. Raises LarkError where a sharded student has no gradients to give.
    """

    def __init__(self, settings: Diagnostics, data: TrajectoryDataModule, folder: Path):
        self.settings, self.data, self.folder = settings, data, folder
        self.found: dict[str, Any] = {"settings": asdict(settings)}
        if settings.name == "full":
            Parallelism(data.make_trainer("")).check_gradients("diagnostics=full")

    def diagnose_selections(self, claim: Claim) -> None:
        """Measure what there is before training; the exact passes of `full` are run, or found cached."""
        data, settings = self.data, self.settings
        if settings.name == "none":
            return
        if is_main():
            self.found |= describe_choice(data, resamples=settings.resamples)
            log_selections(self.found)
        if settings.name == "full":
            wanted = ExactGradients(parameters=settings.parameters, eta=settings.eta)
            sample = measure_sample(data, wanted, claim, problems=settings.problems)
            if sample is None:
                logger.warning(
                    "diagnostics=full compares no score with the truth: no problem has more candidates than "
                    "the budget; lower budget"
                )
            elif is_main():
                self.found["fidelity"] = self._summarise_fidelity(wanted, sample)
                log_fidelity(self.found["fidelity"])
        self._write()

    def _summarise_fidelity(self, wanted: ExactGradients, sample: Candidates) -> dict[str, Any]:
        data, settings = self.data, self.settings
        inside_N = np.isin(data.candidates.row_N, sample.row_N)
        roles = [role for role in data.rules if role in data.selections]
        found, rows = summarise_fidelity(
            sample,
            wanted,
            {f"{data.rules[role].name} ({role})": data.selections[role].score_N[inside_N] for role in roles},
            average=settings.average,
            budget=find_budget(data),
            seed=data.seed,
            resamples=settings.resamples,
        )
        write_table(self.folder / "diagnostics-candidates.csv", rows)
        has_lora = data.scorer.lora is not None and wanted.parameters == "trained"
        return found | {"of_problems": data.candidates.groups.count, "lora": has_lora}

    def diagnose_arms(self, arms: Sequence[Arm]) -> None:
        """Compare the loss curves of the trained arms with the baseline's."""
        if self.settings.name != "none" and is_main():
            self.found["curves"] = compare_curves(arms)
            log_curves(self.found["curves"])
            self._write()

    def select_bins(self) -> dict[str, Selection]:
        """Under `full`, select the candidates in each bin of the selector's score, for an arm each; else nothing."""
        data, bins = self.data, self.settings.bins
        if self.settings.name != "full" or not bins:
            return {}
        candidates, rule = data.candidates, data.rules["selector"].name
        self.bin_N = assign_bins(data.selections["selector"].score_N, candidates, bins=bins, seed=data.seed)
        problems = int((candidates.groups.sum((self.bin_N >= 0).astype(float)) > 0).sum())
        self.bins = {"bins": bins, "rule": rule, "problems": problems, "left_out": int((self.bin_N < 0).sum())}
        if not problems:
            logger.warning(f"no problem has {bins} scored candidates to train bins of; lower diagnostics.bins={bins}")
            return {}
        tokens_N = data.trajectories.span_tokens[candidates.row_N]
        return select_by_bin(self.bin_N, candidates, rule=rule, bins=bins, seed=data.seed, tokens_N=tokens_N)

    def diagnose_bins(self, arms: Sequence[Arm], figures: Mapping[str, dict[str, Any]]) -> None:
        """Compare the arms of `select_bins`; figures: what their evaluations came to, by arm (one may have none)."""
        if is_main():
            of_arms = [figures.get(arm.name, {"per_problem": {}}) for arm in arms]
            rows = summarise_bins(arms, self.data.selections["selector"].score_N, self.bin_N, of_arms)
            self.found["bins"] = self.bins | {"rows": rows, "trends": compute_trends(rows, of_arms)}
            log_bins(self.found["bins"])
        self._write()

    def list_figures(self) -> dict[str, float]:
        """List every figure by its path, as `flatten_figures` does."""
        return flatten_figures(self.found)

    def _write(self) -> None:
        if is_main():
            write_diagnostics(self.folder, self.found)
