"""A progress line on stderr, of rank 0: on a terminal and in a log file alike."""

import sys

from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

LOG_SECONDS = 10.0  # between lines when the output is a file


def show_progress(label: str, total: float, unit: str, *, initial: int = 0) -> tqdm:
    """A progress line on stderr that vanishes at its end; in a log file, nothing for 10 s, then a line every 10 s."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=int(total),
        initial=initial,
        position=0,  # also where one that failed is still open
        desc=label,
        unit=f" {unit}",
        leave=False,
        disable=getattr(rank_zero_only, "rank", 0) != 0,  # lightning sets it when it is imported
        delay=0 if terminal else LOG_SECONDS,
        mininterval=0.2 if terminal else LOG_SECONDS,
        miniters=1,
        dynamic_ncols=terminal,
    )
