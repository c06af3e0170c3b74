"""What a rule can ask the student for. A score names its passes in `needs`; each is computed once and cached.

A pass is a frozen dataclass whose fields are all that its result depends on, besides the student, the tokens and the
seed. `candidates.of(a_pass)` gives its columns, one value a candidate. `Statistics` is special in that its columns are
the candidates' own: `candidates["loss"]`.

Shapes: T span tokens of a trajectory, K scored candidates of its problem, D hidden size.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from lark.common.errors import LarkError

if TYPE_CHECKING:
    from lark.scoring.pass_module import PassModule

AVERAGES = ("trajectory", "token")
"""Over what the loss of an optimizer step is a mean (`sft.average`)."""
PARAMETERS = ("trained", "all")
COST_COLUMNS = ("forward_tokens", "backward_tokens", "computed_tokens", "seconds")
"""Each row's cost while a pass runs; the manifest holds their sums."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A pass over every candidate."""

    module: ClassVar[str]
    """`module:class` of the lark.scoring.pass_module.PassModule that computes it."""
    needs_gradients: ClassVar[bool] = False
    """Whether it takes gradients of the student, which one divided over ranks (trainer=fsdp) does not give."""

    reads: ClassVar[Any] = (1, 0)
    """About how often it takes each token through the student, forwards and backwards."""

    @property
    def name(self) -> str:
        """snake_case, as in manifests and messages."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def identity(self) -> dict[str, Any]:
        return {"pass": self.name, **vars(self)}

    def load_module(self) -> type["PassModule"]:
        """Import the module that computes the pass: torch and lightning come with it."""
        module, _, name = self.module.partition(":")
        return getattr(import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Statistics(Pass):
    """The one forward pass that all statistics come from (lark.scoring.statistics_pass); its settings are `probe`'s."""

    module = "lark.scoring.statistics_pass:StatisticsModule"


@dataclass(frozen=True, kw_only=True)
class LocalWindows(Pass):
    """Surprisal of every step given the prompt and only the `steps_before` steps before it.

    Columns: window_surprisal (one sum in nats a step, an array a row; steps as in the statistics' `step_tokens`).
    """

    module = "lark.scoring.forward_passes:LocalWindowsModule"

    steps_before: int = 4

    @property
    def reads(self) -> tuple[int, int]:  # at most: a window has the prompt and what there is before a step
        return (self.steps_before + 1, 0)


@dataclass(frozen=True, kw_only=True)
class ContentAlone(Pass):
    """The trajectory's content by itself: no prompt, no template; its first token is scored only after a BOS token.

    Columns: alone_tokens, alone_surprisal (sum in nats).
    """

    module = "lark.scoring.forward_passes:ContentAloneModule"


@dataclass(frozen=True, kw_only=True)
class MeanHidden(Pass):
    """The mean of the last hidden states over the span.

    Columns: vector (float32 [D], an array a row).
    """

    module = "lark.scoring.forward_passes:MeanHiddenModule"


@dataclass(frozen=True, kw_only=True)
class HeadGradients(Pass):
    """The gradient of L with respect to the LM head, (1/T) sum_t (pi_t - onehot(y_t)) h_t', without a backward pass.

    `sketch` = [rows, columns] projects both sides by seeded Rademacher matrices, which leaves inner products unbiased;
    null takes the gradient itself. Either way the Gram matrix of a problem's candidates is what is stored.
    Columns: gram, gram_rows as in `Gradients`.
    """

    module = "lark.scoring.gradient_passes:HeadGradientsModule"

    sketch: tuple[int, int] | None = None
    projection_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Gradients(Pass):
    """Gradients of L over the student's parameters: the Gram matrix of each problem's candidates.

    parameters: trained (what the arm trains: every parameter, or LoRA's at its start) | all | last:<n> (the last n
    decoder layers). Needs memory for the K gradients of one problem.
    Columns: squared_norm; gram (float64 [K], inner products with the candidates of the problem), gram_rows (int64 [K],
    the pool rows these are).
    """

    module = "lark.scoring.gradient_passes:GradientsModule"
    needs_gradients = True
    reads = (1, 1)

    parameters: str = "trained"


@dataclass(frozen=True, kw_only=True)
class LossDrops(Pass):
    """What one SGD step of size `eta` on a trajectory does to its own loss: (L(theta) - L(theta - eta grad L)) / eta.

    Columns: drop (nats/token per unit of eta), loss_before (L, nats/token).
    """

    module = "lark.scoring.gradient_passes:LossDropsModule"
    needs_gradients = True
    reads = (2, 1)

    parameters: str = "trained"
    eta: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class ProjectedGradients(Pass):
    """Gradients of L times a seeded Rademacher matrix / sqrt(dimensions), whose inner products are unbiased.

    Columns: vector (float32 [dimensions], an array a row).
    """

    module = "lark.scoring.gradient_passes:ProjectedGradientsModule"
    needs_gradients = True
    reads = (1, 1)

    parameters: str = "trained"
    dimensions: int = 512
    projection_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GradientMatches(Pass):
    """LESS (arXiv 2402.04333): per checkpoint of a warm-up arm, learning rate times the mean over validation examples
    of the cosine between the candidate's Adam-preconditioned gradient and the example's gradient, summed.

    The warm-up arm trains `warmup_share` of the candidates for `epochs` epochs. The validation examples are the
    correct candidates of `validation_problems` problems of the pool, chosen by hash; those of a candidate's own problem
    do not count for it. `subtask` is a pool column that divides the examples into sub-tasks (null: one). `dimensions`
    projects the gradients first, as `ProjectedGradients` does (null: not).
    Columns: match (the largest over sub-tasks).
    """

    module = "lark.scoring.gradient_passes:GradientMatchesModule"
    needs_gradients = True
    parameters: ClassVar[str] = "trained"

    warmup_share: float = 0.05
    epochs: int = 4
    validation_problems: int = 32
    subtask: str | None = None
    dimensions: int | None = None
    projection_seed: int = 0

    @property
    def reads(self) -> tuple[float, float]:  # a checkpoint an epoch, and the warm-up arm
        each = self.epochs * (1 + self.warmup_share)
        return (each, each)


DEFAULT = (Statistics(),)
"""What a function of the user's own is given unless it has an attribute `needs`."""


def needs_of(function: Any) -> tuple[Pass, ...]:
    """The passes a score or filter declares; one that declares nothing gets the statistics.

    Raises LarkError where `needs` is no tuple of passes of this module.
    """
    needs = getattr(function, "needs", DEFAULT)
    if not (isinstance(needs, tuple | list) and all(type(need) in Pass.__subclasses__() for need in needs)):
        known = ", ".join(f"{one.__name__}()" for one in Pass.__subclasses__())
        raise LarkError(
            f"needs={needs!r} of {function!r} is no tuple of passes; name some of lark.scoring.passes: {known}"
        )
    return tuple(needs)


def check_parameters(value: str, setting: str) -> None:
    """LarkError unless `value` is trained, all or last:<n>."""
    count = value.removeprefix("last:")
    if value not in PARAMETERS and not (value.startswith("last:") and count.isdigit() and int(count) >= 1):
        raise LarkError(f"{setting}={value!r} is unknown; set it to {', '.join(PARAMETERS)} or last:<layers>")


def check_average(average: str, setting: str) -> None:
    """Check what a loss is averaged over. Raises LarkError, which names `setting`."""
    if average not in AVERAGES:
        follows = "" if setting == "sft.average" else " (it follows sft.average)"
        raise LarkError(f"{setting}={average!r} is unknown; set it to {' or '.join(AVERAGES)}{follows}")
