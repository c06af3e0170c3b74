"""The probe: the frozen student that yields statistics, one forward pass over every candidate, cached by identity.

Rows are scored in batches of similar length; every `shard_rows` rows a rank writes them to a file of its own. The
cache is complete once its manifest is there; a killed pass goes on with the rows that no file holds yet.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from lark.cache import complete, replacing, write_json
from lark.chat import SPANS, STEPS, Encoded
from lark.models import Student, head_of, hidden_states
from lark.packing import MicroBatch, collate, micro_batches
from lark.stats import VERSION, TokenStatistics, step_sums, token_statistics, trajectory_sums

STEP_COLUMNS = ("step_tokens", "step_surprisal", "step_first_surprisal")
TOKEN_COLUMNS = ("token_surprisal", "token_rank", "token_entropy", "token_log_sum_p2")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured and how the pass is cut.

    top_k: null = exact Brier score; 50 = as LARK's released code computes it.
    keep: sums | tokens (also one value a token: surprisal, rank, entropy, ln sum p^2).
    span: content | authors; step_splitter: sentences | blank_lines; skip: first tokens of a step told apart.
    batch_tokens: tokens of one forward pass, padding included; shard_rows: rows a file, lost at most by a kill.
    """

    top_k: int | None = None
    keep: str = "sums"
    span: str = "content"
    step_splitter: str = "sentences"
    skip: int = 2
    batch_tokens: int = 8192
    shard_rows: int = 512

    def __post_init__(self) -> None:
        if self.keep not in ("sums", "tokens"):
            raise ValueError(f"probe.keep={self.keep!r} is unknown; set it to sums or tokens")
        if self.span not in SPANS or self.step_splitter not in STEPS:
            raise ValueError(
                f"probe.span={self.span!r} or probe.step_splitter={self.step_splitter!r} is unknown; "
                f"set span to one of {', '.join(SPANS)} and step_splitter to one of {', '.join(STEPS)}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"probe.top_k={self.top_k} keeps no logit; set it to null (exact) or at least 1")
        for name, least in (("skip", 0), ("batch_tokens", 1), ("shard_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"probe.{name}={getattr(self, name)} is too small; set it to at least {least}")

    def identity(self) -> dict[str, Any]:
        """The settings that change a statistic (how the pass is cut does not)."""
        settings = {name: getattr(self, name) for name in ("top_k", "keep", "span", "step_splitter", "skip")}
        return settings | {"statistics": VERSION}


class ProbeModule(LightningModule):
    """predict_step: micro-batch -> one row of statistics per trajectory, written to `folder` in shards."""

    def __init__(
        self,
        *,
        student: Student,
        probe: Probe,
        folder: Path,
        lengths: np.ndarray,
        wanted: np.ndarray,
        encoded: Callable[[np.ndarray], list[Encoded]],
    ):
        super().__init__()
        self.student, self.probe, self.folder = student, probe, folder
        self.lengths, self.wanted, self.encoded = lengths, wanted, encoded
        self.student_model: torch.nn.Module | None = None
        self.buffer: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        if self.student_model is None:
            device = self.trainer.strategy.root_device
            self.student_model = (
                self.student.load_model(self.student.resolve_dtype(device)).eval().requires_grad_(False)
            )

    def predict_dataloader(self) -> DataLoader:
        """This rank's micro-batches over the rows that no shard holds yet, longest first (the worst memory first)."""
        done = rows_done(self.folder)
        self.trainer.strategy.barrier("probe-listed")  # nobody writes before everybody has listed
        # All rows are cut, not only the remaining ones: a resumed pass computes the very batches it would have.
        cuts = [self.wanted[cut] for cut in micro_batches(self.lengths[self.wanted], budget=self.probe.batch_tokens)]
        remaining = [cut[~np.isin(cut, done)] for cut in cuts]
        mine = [cut for cut in remaining if len(cut)][self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(_Batches(mine, self.encoded), batch_size=None)  # type: ignore[arg-type]

    @torch.inference_mode()
    def predict_step(self, batch: MicroBatch, batch_idx: int) -> None:
        # The student's own dtype decides, and is what the cache is keyed by; the Trainer's precision is for training.
        with torch.autocast(self.device.type, enabled=False):
            hidden_XD = hidden_states(self.student_model, batch.input_ids_RL, batch.position_ids_RL)
            tokens = token_statistics(
                hidden_XD[batch.predict_N], batch.target_N, head_of(self.student_model), top_k=self.probe.top_k
            )
        encoded = self.encoded(np.array(batch.rows))
        ends = torch.tensor([row.end_of_turn for row in encoded], device=batch.target_N.device)
        sums = trajectory_sums(tokens, batch.row_N, batch.position_N, ends, rows=len(encoded))
        self.buffer += _table_rows(batch, encoded, sums, tokens, self.probe)
        if len(self.buffer) >= self.probe.shard_rows:
            self._write()

    def on_predict_end(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.buffer:
            path = self.folder / f"part-{self.global_rank}-{min(row['row'] for row in self.buffer)}.parquet"
            with replacing(path) as temporary:
                pq.write_table(pa.Table.from_pylist(self.buffer), temporary)
            self.buffer = []


class _Batches(torch.utils.data.Dataset):
    def __init__(self, cuts: Sequence[np.ndarray], encoded: Callable[[np.ndarray], list[Encoded]]):
        self.cuts, self.encoded = cuts, encoded

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> MicroBatch:
        rows = self.cuts[index]
        return collate(self.encoded(rows), rows.tolist())


def _table_rows(
    batch: MicroBatch, encoded: list[Encoded], sums: dict[str, torch.Tensor], tokens: TokenStatistics, probe: Probe
) -> list[dict[str, Any]]:
    columns = {name: values.tolist() for name, values in sums.items()}
    token_arrays = [
        x.float().cpu().numpy() for x in (tokens.surprisal_N, tokens.rank_N, tokens.entropy_N, tokens.log_sum_p2_N)
    ]
    cuts = np.cumsum(columns["num_tokens"])[:-1]
    by_row = [np.split(array, cuts) for array in token_arrays]
    rows = []
    for i, (row, source) in enumerate(zip(batch.rows, encoded, strict=True)):
        record: dict[str, Any] = {"row": row} | {name: values[i] for name, values in columns.items()}
        surprisal_T = by_row[0][i]
        end = source.end_of_turn if source.end_of_turn >= 0 else len(surprisal_T)
        record |= zip(STEP_COLUMNS, step_sums(surprisal_T, source.steps, end, skip=probe.skip), strict=True)
        if probe.keep == "tokens":
            record |= {name: array[i] for name, array in zip(TOKEN_COLUMNS, by_row, strict=True)}
        rows.append(record)
    return rows


def rows_done(folder: Path) -> np.ndarray:
    """Row numbers that the shards in `folder` hold."""
    parts = [pq.read_table(path, columns=["row"])["row"].to_numpy() for path in sorted(folder.glob("part-*.parquet"))]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def measure(
    trainer: Trainer,
    module: ProbeModule,
    identity: dict[str, Any],
) -> None:
    """Run the pass over every wanted row under `trainer` and complete the cache folder (rank 0 merges)."""
    module.folder.mkdir(parents=True, exist_ok=True)
    start, resumed = time.monotonic(), len(rows_done(module.folder))
    trainer.predict(module, return_predictions=False)
    trainer.strategy.barrier("probe-written")
    if trainer.is_global_zero:
        _merge(module.folder, module.wanted)
        seconds = time.monotonic() - start
        tokens = int(module.lengths[module.wanted].sum())
        cost = {"rows": len(module.wanted), "resumed_rows": resumed, "forward_tokens": tokens, "seconds": seconds}
        write_json(module.folder / "manifest.json", {"identity": identity, **cost})
        for part in module.folder.glob("part-*.parquet"):  # not before the folder is complete
            part.unlink()
    trainer.strategy.barrier("probe-complete")


def _merge(folder: Path, wanted: np.ndarray) -> None:
    """All shards into statistics.parquet, ordered by row; memory grows with rows times columns, not with tokens."""
    parts = sorted(folder.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in parts])
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    rows = table["row"].to_numpy()[order]
    assert np.array_equal(rows, np.sort(wanted)), "the probe's shards do not hold every row exactly once"
    with replacing(folder / "statistics.parquet") as temporary:
        pq.write_table(table.take(order), temporary)


def read_statistics(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a complete cache folder, with the means derived from the sums: loss, brier, entropy."""
    assert complete(folder)
    table = pq.read_table(folder / "statistics.parquet")
    columns = {name: _numpy(table[name]) for name in table.column_names}
    with np.errstate(divide="ignore", invalid="ignore"):
        for mean, total in (("loss", "sum_surprisal"), ("brier", "sum_brier"), ("entropy", "sum_entropy")):
            columns[mean] = columns[total] / columns["num_tokens"]
    return columns


def _numpy(column: Iterable[Any]) -> np.ndarray:
    return column.to_numpy()  # type: ignore[attr-defined]
