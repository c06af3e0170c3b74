"""The probe: the frozen student, asked for a few numbers a trajectory, once, and cached by identity.

A `PassModule` is one pass over every candidate (lark.passes says which there are); `ProbeModule` is the one that all
statistics come from. Rows are computed in units; every `shard_rows` rows a rank writes them to a file of its own. The
cache is complete once its manifest is there; a killed pass goes on with the rows that no file holds yet.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from lark.cache import write_json
from lark.chat import SPANS, STEPS, Encoded
from lark.models import Student, head_of, hidden_states
from lark.packing import MicroBatch, collate, micro_batches
from lark.passes import Pass
from lark.shards import merge, remove_shards, rows_done, write_shard
from lark.stats import VERSION, TokenStatistics, step_sums, token_statistics, trajectory_sums
from lark.trajectories import Trajectories

STEP_COLUMNS = ("step_tokens", "step_surprisal", "step_first_surprisal")
TOKEN_COLUMNS = ("token_surprisal", "token_rank", "token_entropy", "token_log_sum_p2")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured and how the pass is cut.

    top_k: null = exact Brier score; 50 = as LARK's released code computes it.
    keep: sums | tokens (also one value a token: surprisal, rank, entropy, ln sum p^2).
    span: content | authors; step_splitter: sentences | blank_lines; skip: first tokens of a step told apart.
    batch_tokens: tokens of one forward pass, padding included; shard_rows: rows a file, lost at most by a kill.
    model: null = the student that is trained; else another option of the model group, whose choice that student then
        gets (is a choice specific to its student?).
    """

    top_k: int | None = None
    keep: str = "sums"
    span: str = "content"
    step_splitter: str = "sentences"
    skip: int = 2
    batch_tokens: int = 8192
    shard_rows: int = 512
    model: str | None = None

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


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass works on: `rows` [N] of `pool`, measured by `student`; `seed` is the arm's, of which LoRA's start and
    whatever a pass draws depend. `warmup` are the checkpoints of a warm-up arm with their learning rates, where a pass
    needs one.
    """

    student: Student
    probe: Probe
    pool: Trajectories
    rows: np.ndarray
    seed: int
    warmup: tuple[tuple[Path, float], ...] = ()


class PassModule(LightningModule):
    """One pass of the student over `work.rows`; predict_step: a unit of rows -> their columns, kept in shards.

    A pass says what its units are, what a batch is and what is measured in it. It may keep gradients: the pass runs
    under no_grad, not in inference mode.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ()
    """Modules whose source text keys the cache, besides those of the base."""

    def __init__(self, *, wanted: Pass, work: Work, folder: Path):
        super().__init__()
        self.wanted, self.work, self.folder = wanted, work, folder
        self.student_model: Any = None
        self.buffer: list[dict[str, Any]] = []

    @classmethod
    def identity(cls, wanted: Pass, work: Work) -> dict[str, Any]:
        """What the columns depend on besides the student, its tokens and the sources."""
        return wanted.identity()

    def load(self, device: torch.device) -> torch.nn.Module:
        """The student, in eval mode and frozen."""
        return self.work.student.load_model(self.work.student.resolve_dtype(device)).eval().requires_grad_(False)

    def units(self) -> list[np.ndarray]:
        """Rows that are computed together; a unit is never split over ranks or files. The worst for memory first."""
        lengths, rows = self.work.pool.length, self.work.rows
        return [rows[cut] for cut in micro_batches(lengths[rows], budget=self.work.probe.batch_tokens)]

    def batch(self, rows: np.ndarray) -> Any:
        """What predict_step gets for a unit."""
        return collate(self.work.pool.encoded(rows), rows.tolist())

    def measure(self, batch: Any) -> list[dict[str, Any]]:
        """The columns of a batch, one dict a row with its number under "row"; arrays are lists in the file."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def configure_model(self) -> None:
        if self.student_model is None:
            self.student_model = self.load(self.trainer.strategy.root_device)

    def predict_dataloader(self) -> DataLoader:
        """This rank's units that no shard holds yet."""
        done = rows_done(self.folder)
        self.trainer.strategy.barrier("probe-listed")  # nobody writes before everybody has listed
        # All rows are cut, not only the remaining ones: a resumed pass computes the very batches it would have.
        remaining = [unit[~np.isin(unit, done)] for unit in self.units()]
        mine = [unit for unit in remaining if len(unit)][self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(_Batches(mine, self.batch), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves micro-batches, alone or in a list; what else a batch holds stays, which Lightning would refuse."""
        if isinstance(batch, list):
            return [self.transfer_batch_to_device(part, device, dataloader_idx) for part in batch]
        return batch.to(device) if isinstance(batch, MicroBatch) else batch

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        start = time.monotonic()
        # The student's own dtype decides, and is what the cache is keyed by; the Trainer's precision is for training.
        with torch.autocast(self.device.type, enabled=False):
            measured = self.measure(batch)
        seconds = (time.monotonic() - start) / len(measured)
        self.buffer += [{"forward_tokens": 0, "backward_tokens": 0, "seconds": seconds} | row for row in measured]
        if len(self.buffer) >= self.work.probe.shard_rows:
            self._write()

    def on_predict_end(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.buffer:
            write_shard(self.folder, self.global_rank, self.buffer)
            self.buffer = []


class _Batches(torch.utils.data.Dataset):
    def __init__(self, units: Sequence[np.ndarray], batch: Callable[[np.ndarray], Any]):
        self.units, self.batch = units, batch

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Any:
        return self.batch(self.units[index])


class ProbeModule(PassModule):
    """The statistics: one forward pass, token statistics in chunks of the vocabulary, sums a trajectory."""

    SOURCES = ("stats",)

    @classmethod
    def identity(cls, wanted: Pass, work: Work) -> dict[str, Any]:
        return wanted.identity() | work.probe.identity()

    @torch.inference_mode()
    def measure(self, batch: MicroBatch) -> list[dict[str, Any]]:
        hidden_XD = hidden_states(self.student_model, batch.input_ids_RL, batch.position_ids_RL)
        tokens = token_statistics(
            hidden_XD[batch.predict_N], batch.target_N, head_of(self.student_model), top_k=self.work.probe.top_k
        )
        encoded = self.work.pool.encoded(np.array(batch.rows))
        ends = torch.tensor([row.end_of_turn for row in encoded], device=batch.target_N.device)
        sums = trajectory_sums(tokens, batch.row_N, batch.position_N, ends, rows=len(encoded))
        return _table_rows(batch, encoded, sums, tokens, self.work.probe)


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
        record: dict[str, Any] = {"row": row, "forward_tokens": len(source.input_ids)}
        record |= {name: values[i] for name, values in columns.items()}
        surprisal_T = by_row[0][i]
        end = source.end_of_turn if source.end_of_turn >= 0 else len(surprisal_T)
        record |= zip(STEP_COLUMNS, step_sums(surprisal_T, source.steps, end, skip=probe.skip), strict=True)
        if probe.keep == "tokens":
            record |= {name: array[i] for name, array in zip(TOKEN_COLUMNS, by_row, strict=True)}
        rows.append(record)
    return rows


def measure(
    trainer: Trainer, module: PassModule, identity: dict[str, Any], *, before: Mapping[str, float] | None = None
) -> None:
    """Run the pass over every row under `trainer` and complete the cache folder (rank 0 merges).

    The manifest says what it cost: tokens through the student forwards and backwards, and device-seconds at work (model
    loading and waiting not counted), those of an interrupted pass included, and what had to be done `before`.
    """
    module.folder.mkdir(parents=True, exist_ok=True)
    resumed = len(rows_done(module.folder))
    trainer.predict(module, return_predictions=False)
    trainer.strategy.barrier("probe-written")
    if trainer.is_global_zero:
        cost = merge(module.folder, module.work.rows)
        cost = {name: value + (before or {}).get(name, 0) for name, value in cost.items()}
        counts = {"rows": len(module.work.rows), "resumed_rows": resumed}
        write_json(module.folder / "manifest.json", {"identity": identity, **counts, **cost})
        remove_shards(module.folder)  # not before the folder is complete
    trainer.strategy.barrier("probe-complete")
