"""The pass that all statistics come from: one forward pass, token statistics, sums a trajectory.

Shapes: N scored tokens of a micro-batch, R rows (trajectories), T span tokens of a row.
"""

from typing import Any

import numpy as np
import torch

from lark.scoring.pass_module import PassInputs, PassModule, ScoringSettings
from lark.scoring.passes import Pass
from lark.student.batching import MicroBatch
from lark.student.chat import TokenizedTrajectory
from lark.student.student import get_head
from lark.student.token_statistics import TokenStatistics, compute_token_statistics, sum_by_step, sum_by_trajectory

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
    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        micro = self.collate(rows)
        tokens = compute_token_statistics(
            self.compute_hidden(micro)[micro.predict_N],
            micro.target_N,
            get_head(self.student_model),
            top_k=self.inputs.settings.top_k,
            compiled=self.compile_disabled_reason is None,
        )
        tokenized = self.inputs.pool.read_tokens(np.array(micro.rows))
        end_R = torch.tensor([row.end_of_turn for row in tokenized], device=micro.target_N.device)
        sums = sum_by_trajectory(tokens, micro.row_N, micro.position_N, end_R, rows=len(tokenized))
        return make_rows(micro, tokenized, sums, tokens, self.inputs.settings)


def make_rows(
    micro: MicroBatch,
    tokenized: list[TokenizedTrajectory],
    sums: dict[str, torch.Tensor],
    tokens: TokenStatistics,
    settings: ScoringSettings,
) -> list[dict[str, Any]]:
    """Put together the columns of each row: sums, means, sums by step and, if they are kept, the tokens' values."""
    means = {mean: sums[total] / sums["num_tokens"] for mean, total in MEANS.items()}
    columns = {name: values_R.tolist() for name, values_R in {**sums, **means}.items()}
    token_arrays = [
        x.float().cpu().numpy() for x in (tokens.surprisal_N, tokens.rank_N, tokens.entropy_N, tokens.log_sum_p2_N)
    ]
    borders = np.cumsum(columns["num_tokens"])[:-1]
    by_row = [np.split(array, borders) for array in token_arrays]
    rows = []
    for i, (row, source) in enumerate(zip(micro.rows, tokenized, strict=True)):
        record: dict[str, Any] = {"row": row, "forward_tokens": len(source.input_ids)}
        record |= {name: values[i] for name, values in columns.items()}
        surprisal_T = by_row[0][i]
        end = source.end_of_turn if source.end_of_turn >= 0 else len(surprisal_T)
        record |= zip(STEP_COLUMNS, sum_by_step(surprisal_T, source.steps, end, skip=settings.skip), strict=True)
        if settings.keep == "tokens":
            record |= {name: array[i] for name, array in zip(TOKEN_COLUMNS, by_row, strict=True)}
        rows.append(record)
    return rows
