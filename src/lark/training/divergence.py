"""Tell when training has gone wrong: a loss or gradient that is not a number, or a loss far above those before it."""

import math
from collections.abc import Sequence
from statistics import median

from lark.common.errors import LarkError

WINDOW = 32  # steps that a spike is told from
LEAST = 8  # of them, before any is
HARMLESS = 0.5  # nats/token, below which no loss is a spike


class DivergedError(LarkError):
    """Training came to a loss or gradient that is not a number, or to a spike."""


class Losses:
    """The losses of the last optimizer steps (nats/token, as of weights that are 1 on average). spike: see
    `lark.training.recipe.Recipe`.
    """

    def __init__(self, *, spike: float | None, recent: Sequence[float] = ()):
        self.spike, self.recent = spike, list(recent)

    def append(self, loss: float) -> None:
        self.recent = [*self.recent, loss][-WINDOW:]

    def find_reason_to_stop(self, loss: float, norm: float) -> str | None:
        """Say why a step of this loss and gradient norm must not be taken; None if it may."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if self.spike is None or len(self.recent) < LEAST:
            return None
        usual = median(self.recent)
        if loss > max(self.spike * usual, HARMLESS):
            return f"its loss of {loss:.4g} is more than sft.spike={self.spike:g} times the usual {usual:.4g}"
        return None
