"""The pass that all statistics come from: one forward pass, token statistics, sums a trajectory.

Shapes: N scored tokens of a micro-batch, R rows (trajectories), T span tokens of a row.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lark.scoring.pass_module import PassInputs, PassModule, ScoringSettings
from lark.scoring.passes import Pass
from lark.student.batching import MicroBatch
from lark.student.model_parts import get_head
from lark.student.token_statistics import (
    Head,
    TokenStatistics,
    compute_token_statistics,
    name_sums,
    sum_by_step,
    sum_by_trajectory,
)
from lark.student.transfer import copy_to_host

MEANS = {"loss": "sum_surprisal", "brier": "sum_brier", "entropy": "sum_entropy"}
"""Means over the span and the sums they come from."""
STEP_COLUMNS = ("step_tokens", "step_surprisal", "step_first_surprisal")
TOKEN_COLUMNS = ("token_surprisal", "token_rank", "token_entropy", "token_log_sum_p2")


class StatisticsModule(PassModule):
    """Token statistics are computed in chunks of tokens, so that logits never exist for all of a micro-batch."""

    @classmethod
    def identity(cls, wanted: Pass, inputs: PassInputs) -> dict[str, Any]:
        return wanted.identity() | inputs.settings.identity()

    @torch.inference_mode()
    def measure(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        micro, settings = self.collate(rows), self.inputs.settings
        hidden_XD, head = self.compute_hidden(micro), get_head(self.student_model)
        found = summarise_tokens(hidden_XD, micro, head, settings, compiled=self.compile_disabled_reason is None)
        return make_rows(micro, copy_to_host(*found), settings)


def summarise_tokens(
    hidden_XD: Tensor, micro: MicroBatch, head: Head, settings: ScoringSettings, *, compiled: bool
) -> list[Tensor]:
    """Compute what the host is to have of a micro-batch, on the device: sums a trajectory, then the tokens' surprisal,
    and if they are kept rank, entropy and ln sum p^2.
    """
    tokens = compute_token_statistics(
        hidden_XD[micro.predict_N], micro.target_N, head, top_k=settings.top_k, compiled=compiled
    )
    where = (micro.row_N, micro.position_N, micro.end_of_turn_R)
    if hidden_XD.device.type == "mps":  # Apple's GPUs have no float64
        tokens, where = TokenStatistics(*(x.cpu() for x in vars(tokens).values())), tuple(x.cpu() for x in where)
    sum_CR = sum_by_trajectory(tokens, *where)
    kept = (tokens.rank_N, tokens.entropy_N, tokens.log_sum_p2_N) if settings.keep == "tokens" else ()
    return [sum_CR, *(x.float() for x in (tokens.surprisal_N, *kept))]


def make_rows(
    micro: MicroBatch, read: Callable[[], list[np.ndarray]], settings: ScoringSettings
) -> Iterator[dict[str, Any]]:
    """Put together the columns of each row: sums, means, sums by step and, if they are kept, the tokens' values. Waits
    for the device once the first row is asked for.
    """
    sum_CR, *token_arrays = read()
    sums = name_sums(sum_CR)
    means = {mean: sums[total] / sums["num_tokens"] for mean, total in MEANS.items()}
    columns = {name: values_R.tolist() for name, values_R in {**sums, **means}.items()}
    borders = np.cumsum(columns["num_tokens"])[:-1]
    by_row = [np.split(array, borders) for array in token_arrays]
    for i, (row, source) in enumerate(zip(micro.rows, micro.encoded, strict=True)):
        record: dict[str, Any] = {"row": row, "forward_tokens": len(source.input_ids)}
        record |= {name: values[i] for name, values in columns.items()}
        surprisal_T = by_row[0][i]
        end = source.end_of_turn if source.end_of_turn >= 0 else len(surprisal_T)
        record |= zip(STEP_COLUMNS, sum_by_step(surprisal_T, source.steps, end, skip=settings.skip), strict=True)
        if settings.keep == "tokens":
            record |= {name: array[i] for name, array in zip(TOKEN_COLUMNS, by_row, strict=True)}
        yield record
