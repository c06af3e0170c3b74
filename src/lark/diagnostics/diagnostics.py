"""What a run says about its own scores and selections: `diagnostics=none|cheap|full`.

cheap   from the statistics and selections that are there anyway: correlations of all scores with loss, length and
        correctness (lark.selection.within_problem), what the selections are made of (lark.diagnostics.composition), loss curves (lark.diagnostics.curves)
full    also, on a sample of problems, exact gradients and real loss drops beside the proxies (lark.diagnostics.exact_gradients,
        lark.diagnostics.fidelity), and a student trained on each bin of the score (lark.diagnostics.quantile_bins)

<run>/diagnostics.json has every figure with its problems, chance value and interval, diagnostics-*.csv the tables.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lark.common.cache import read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.ranks import Claim, is_main
from lark.diagnostics import quantile_bins
from lark.diagnostics.curves import against_baseline, own_loss_ratio
from lark.diagnostics.exact_gradients import ExactGradients
from lark.diagnostics.fidelity_sample import measure_sample, of_sample
from lark.diagnostics.files import flat, levelled, plain, tables, write_table
from lark.diagnostics.lines import describe_arms, describe_bins, describe_fidelity, describe_selections
from lark.diagnostics.selection_diagnostics import of_choice
from lark.scoring.passes import check_parameters
from lark.selection.selection import Selection
from lark.student.distributed import Parallelism
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import check_average

LEVELS = ("none", "cheap", "full")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """How much is measured about scores and selections.

    name: none | cheap | full. resamples: bootstrap resamples of problems for intervals.
    Of full alone: problems: those whose trajectories' gradients are taken, chosen by hash of their id among those with
    more candidates than the budget. parameters: trained | all | last:<n>, those that the exact quantities are over.
    average: trajectory | token, the loss whose exact gain is measured.
    eta: the SGD step of the loss drops; step_tolerance: what halving it may change, relative. bins: of the score, each
    of which a student is trained on; 0: none.
    """

    name: str = "cheap"
    resamples: int = 1000
    problems: int = 40
    parameters: str = "trained"
    average: str = "trajectory"
    eta: float = 1e-3
    step_tolerance: float = 0.05
    bins: int = 4

    def __post_init__(self) -> None:
        if self.name not in LEVELS:
            raise LarkError(f"diagnostics.name={self.name!r} is unknown; set it to one of {', '.join(LEVELS)}")
        if self.resamples < 100:
            raise LarkError(f"diagnostics.resamples={self.resamples} is too few for intervals; set at least 100")
        if self.problems < 1:
            raise LarkError(f"diagnostics.problems={self.problems} is no sample; set it to at least 1")
        check_parameters(self.parameters, "diagnostics.parameters")
        check_average(self.average, "diagnostics.average")
        if not self.eta > 0:
            raise LarkError(f"diagnostics.eta={self.eta} is no step; set it above 0, for example 1e-3")
        if not self.step_tolerance > 0:
            raise LarkError(f"diagnostics.step_tolerance={self.step_tolerance} lets nothing pass; set it above 0")
        if self.bins < 0 or self.bins == 1:
            raise LarkError(f"diagnostics.bins={self.bins} compares nothing; set it to 2 or more, or 0 for none")


class Diagnosis:
    """The diagnostics of one run as they come together: `of_selections`, then `of_arms` if it trains; all ranks call
    both, rank 0 writes. `found` is what diagnostics.json holds. Raises LarkError for what trainer=fsdp cannot do.
    """

    def __init__(self, settings: Diagnostics, data: TrajectoryDataModule, folder: Path):
        self.settings, self.data, self.folder = settings, data, folder
        self.found: dict[str, Any] = {"settings": asdict(settings)}
        if settings.name == "full":
            Parallelism(data.make_trainer("")).check_gradients("diagnostics=full")

    def of_selections(self, claim: Claim) -> None:
        """What can be said before training; the exact passes of `full` are run or found cached."""
        if self.settings.name == "none":
            return
        start = time.monotonic()
        if is_main():
            self.found |= of_choice(self.data, resamples=self.settings.resamples)
            self.found["seconds"] = time.monotonic() - start
            self._tell(describe_selections(self.found))
        if self.settings.name == "full":
            wanted = ExactGradients(parameters=self.settings.parameters, eta=self.settings.eta)
            sample, manifest = measure_sample(self.data, wanted, claim, problems=self.settings.problems)
            if sample is not None and is_main():
                self.found["fidelity"], rows = of_sample(
                    sample,
                    wanted,
                    manifest,
                    self.data,
                    average=self.settings.average,
                    resamples=self.settings.resamples,
                    tolerance=self.settings.step_tolerance,
                )
                write_table(self.folder / "diagnostics-candidates.csv", rows)
                self._tell(describe_fidelity(self.found["fidelity"]))
            elif sample is None:
                logger.warning(
                    "diagnostics=full measures nothing: no problem has more candidates than the budget; lower it"
                )
        self._write()

    def of_arms(self, arms: Sequence[Arm]) -> None:
        """Compare the loss curves of the trained arms with the baseline's."""
        if self.settings.name == "none":
            return
        self.found["curves"] = curves_of(arms) if is_main() else {}
        self._tell(describe_arms(self.found["curves"]))
        self._write()

    def select_bins(self) -> dict[str, Selection]:
        """Under `full`, select the candidates in each bin of the selector's score, for an arm each; else nothing."""
        data, bins = self.data, self.settings.bins
        if self.settings.name != "full" or not bins:
            return {}
        score_N = data.selections["selector"].score_N
        self.bin_N = quantile_bins.bins_of(score_N, data.candidates, bins=bins, seed=data.seed)
        self.bins = {
            "bins": bins,
            "rule": data.rules["selector"].name,
            "problems": int((data.candidates.groups.sum((self.bin_N >= 0).astype(float)) > 0).sum()),
            "left_out": int((self.bin_N < 0).sum()),
        }
        if not self.bins["problems"]:
            logger.warning(f"no problem has {bins} scored candidates to train bins of; lower diagnostics.bins={bins}")
            return {}
        return quantile_bins.selections_of(
            self.bin_N,
            data.candidates,
            rule=self.bins["rule"],
            bins=bins,
            seed=data.seed,
            tokens_N=data.trajectories.span_tokens[data.candidates.row_N],
        )

    def of_bins(self, arms: Sequence[Arm], figures: Mapping[str, dict[str, Any]]) -> None:
        """Compare the arms of `select_bins`; figures: what their evaluations came to, by arm (one may have none)."""
        if is_main():
            nothing = {"metrics": {}, "intervals": {}, "levels": {}, "per_problem": {}}
            of_arms = [figures.get(arm.name, nothing) for arm in arms]
            rows = quantile_bins.figures_of(arms, self.data.selections["selector"].score_N, self.bin_N, of_arms)
            self.found["bins"] = self.bins | {"rows": rows, "trends": quantile_bins.trends(rows, of_arms)}
            write_table(self.folder / "diagnostics-bins.csv", [levelled(row) for row in rows])
            self._tell(describe_bins(self.found["bins"]))
        self._write()

    def figures(self) -> dict[str, float]:
        """Every figure, as `flat` gives them."""
        return flat(self.found)

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            logger.info(line)

    def _write(self) -> None:
        if is_main():
            write_json(self.folder / "diagnostics.json", plain(self.found))
            for name, rows in tables(self.found).items():
                write_table(self.folder / f"diagnostics-{name}.csv", rows)


def curves_of(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """By arm that was trained: its held-out loss curve beside the baseline's, if there is one, and its own training
    loss (lark.diagnostics.curves).
    """
    trained = [arm for arm in arms if arm.selection is not None and arm.is_trained]
    curves = {arm.name: read_json(arm.folder / "trained.json")["curve"] for arm in trained}
    return {
        arm.name: {"rule": arm.rule, "label": "one seed: its variance is not estimated"}
        | (against_baseline(curves[arm.name], curves["baseline"]) if "baseline" in curves else {})
        | {"own_training_loss_not_comparable": own_loss_ratio(arm.folder)}
        for arm in trained
    }
