"""The passes that need forward passes of other sequences, or other figures of the same ones, than the statistics.

Surprisals come from the same function as the statistics', so that a window that is the whole prefix gives the same sum.

Shapes: R rows of a batch, S steps of a row, T span tokens of a sequence, X positions of a micro-batch, N tokens of it
that count, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lark.scoring.pass_module import PassInputs, PassModule
from lark.scoring.passes import LocalWindows, Pass
from lark.student.batching import lay_out_row, pack_rows, plan_alone, plan_consecutive
from lark.student.chat import TokenizedTrajectory
from lark.student.context_length import find_rope_border
from lark.student.model_parts import get_head
from lark.student.token_statistics import compute_token_statistics, sum_by_step
from lark.student.transfer import copy_to_host


class LocalWindowsModule(PassModule):
    """Every step's surprisal given the prompt and the `steps_before` steps before it (LALP, arXiv 2510.03988).

    A window is cut out of the row's token ids: the prompt's, then those of the steps. So a step has the same tokens in
    every context. The first steps, whose windows are the whole prefix, come from one sequence. The end-of-turn token
    belongs to no step and is in no window.
    """

    CUTS_INSIDE = True
    wanted: LocalWindows

    @classmethod
    def identity(cls, wanted: Pass, inputs: PassInputs) -> dict[str, Any]:
        return wanted.identity() | {"step_splitter": inputs.settings.step_splitter}

    @torch.inference_mode()
    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        by_row = [cut_windows(row, self.wanted.steps_before) for row in self.inputs.pool.read_tokens(rows)]
        windows = [window for of_row in by_row for window in of_row]
        sums = iter(
            sum_by_step(surprisal_T, window.steps, len(surprisal_T), skip=0)[1]
            for window, surprisal_T in zip(windows, compute_surprisals(self, windows), strict=True)
        )
        return [
            {
                "row": row,
                "window_surprisal": np.concatenate([np.zeros(0), *(next(sums) for _ in of_row)]),
                "forward_tokens": sum(len(window.input_ids) for window in of_row),
            }
            for row, of_row in zip(rows.tolist(), by_row, strict=True)
        ]


def cut_windows(row: TokenizedTrajectory, steps_before: int) -> list[TokenizedTrajectory]:
    """Make sequences whose spans, in order, hold each step of the row once, behind the prompt and at least the
    `steps_before` steps before it: exactly these, or all where there are fewer.
    """
    prompt, span = row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]
    end = row.end_of_turn if row.end_of_turn >= 0 else len(span)
    if end == 0:
        return []
    borders = [*row.steps, end]
    first = min(steps_before + 1, len(row.steps))  # steps whose window is the whole prefix
    together = TokenizedTrajectory(
        input_ids=prompt + span[: borders[first]],
        prompt_tokens=len(prompt),
        end_of_turn=-1,
        steps=row.steps[:first],
    )
    alone = [
        TokenizedTrajectory(
            input_ids=prompt + span[borders[step - steps_before] : borders[step + 1]],
            prompt_tokens=len(prompt) + borders[step] - borders[step - steps_before],
            end_of_turn=-1,
            steps=[0],
        )
        for step in range(first, len(row.steps))
    ]
    return [together, *alone]


class ContentAloneModule(PassModule):
    """Surprisal of the content without prompt and template, for IFD's PPL(y) (arXiv 2402.00530).

    The content is tokenised by itself; a special token that it spells out is text, as in the row. The tokenizer's BOS
    token goes before it if there is one; without one nothing predicts the first token, and it is not scored. It is cut
    to task.max_length, and where the row was cut, to as many tokens as the row has of it.
    """

    CUTS_INSIDE = True

    def tokenize_alone(self, rows: np.ndarray) -> list[TokenizedTrajectory]:
        pool = self.inputs.pool
        tokenizer = pool.chat.tokenizer
        texts = pool.column("text", rows).tolist()
        ids: Any = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        alone = []
        for content, row in zip(ids, pool.read_tokens(rows), strict=True):
            was_cut = row.end_of_turn < 0
            content = content[: len(row.input_ids) - row.prompt_tokens] if was_cut else content
            kept = (start + content)[: pool.task.max_length]
            alone.append(TokenizedTrajectory(input_ids=kept, prompt_tokens=1, end_of_turn=-1, steps=[0]))
        return alone

    @torch.inference_mode()
    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        alone = self.tokenize_alone(rows)
        surprisals = iter(compute_surprisals(self, [one for one in alone if len(one.input_ids) > 1]))
        measured = []
        for row, one in zip(rows.tolist(), alone, strict=True):
            surprisal_T = next(surprisals) if len(one.input_ids) > 1 else np.zeros(0)
            columns = {"alone_tokens": len(surprisal_T), "alone_surprisal": float(surprisal_T.sum())}
            measured.append({"row": row, **columns, "forward_tokens": len(one.input_ids) if len(surprisal_T) else 0})
        return measured


class MeanHiddenModule(PassModule):
    """Mean over the span, end-of-turn token included, of the states that the LM head would read (after the last
    norm) at the span's own tokens: those that have seen the token, not those that predict it.
    """

    @torch.inference_mode()
    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        micro = self.collate(rows)
        observed_ND = self.compute_hidden(micro)[micro.observed_N].float()
        spans = self.inputs.pool.span_tokens[list(micro.rows)].tolist()
        mean_RD = torch.stack([hidden_TD.mean(0) for hidden_TD in observed_ND.split(spans)])
        lengths = [len(row.input_ids) for row in micro.encoded]
        return [
            {"row": row, "vector": vector_D, "forward_tokens": length}
            for row, vector_D, length in zip(micro.rows, copy_to_host(mean_RD)()[0], lengths, strict=True)
        ]


def compute_surprisals(module: PassModule, sequences: Sequence[TokenizedTrajectory]) -> list[np.ndarray]:
    """Compute the surprisal (nats, float64 [T]) of the span tokens of each sequence, in micro-batches of the module's
    `batch_tokens`; sequences next to each other may begin alike.
    """
    surprisals: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    lengths = np.array([len(sequence.input_ids) for sequence in sequences], np.int64)
    head, share = get_head(module.student_model), module.inputs.settings.share
    if module.unpacked_reason:
        batches = plan_alone(lengths)
    else:
        long = lengths > find_rope_border(module.student_model)
        others = np.flatnonzero(~long)
        batches = list(np.flatnonzero(long)[:, None])
        batches += [others[piece] for piece in plan_consecutive(lengths[others], budget=module.batch_tokens)]
    copies = []
    for piece in batches:
        of_piece, numbers = [sequences[i] for i in piece], piece.tolist()
        packed = module.unpacked_reason is None
        micro = pack_rows(of_piece, numbers, share=share) if packed else lay_out_row(*of_piece, *numbers)
        micro = micro.to(head.weight_VD.device)
        tokens = compute_token_statistics(module.compute_hidden(micro)[micro.predict_N], micro.target_N, head)
        copies.append((micro, copy_to_host(tokens.surprisal_N)))
    for micro, read in copies:
        counts = [len(row.input_ids) - max(row.prompt_tokens, 1) for row in micro.encoded]
        pieces = np.split(read()[0].astype(np.float64), np.cumsum(counts)[:-1])
        for i, surprisal_T in zip(micro.rows, pieces, strict=True):
            surprisals[i] = surprisal_T
    return surprisals
