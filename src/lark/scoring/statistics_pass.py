"""The probe: the frozen student, asked for a few numbers a trajectory, once, and cached by identity.

A `PassModule` is one pass over every candidate (lark.scoring.passes says which there are); `ProbeModule` is the one that all
statistics come from. Rows are computed in units; every `shard_rows` rows a rank writes them to a file of its own. The
cache is complete once its manifest is there; a killed pass goes on with the rows that no file holds yet.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from lark.common.cache import write_json
from lark.common.errors import LarkError
from lark.common.table_cache import list_parts, merge_parts, read_row_numbers, write_rows
from lark.scoring.passes import COST_COLUMNS, HeadGradients, Pass
from lark.scoring.progress import total_progress
from lark.student.attention import enable_prefix_sharing
from lark.student.batching import MicroBatch, collate, collate_prefix_tree, plan_padded, plan_prefix_units
from lark.student.chat import SPANS, STEPS, TokenizedTrajectory
from lark.student.context_length import find_rope_border
from lark.student.distributed import Parallelism
from lark.student.memory import LEAST_TOKENS, estimate_scoring_tokens, is_out_of_memory, release_memory
from lark.student.student import Student, compute_hidden_states, get_head
from lark.student.token_statistics import (
    VERSION,
    TokenStatistics,
    compute_token_statistics,
    find_compile_failure,
    sum_by_step,
    sum_by_trajectory,
)
from lark.student.tokenized_pool import TokenizedPool

COMPILE_FROM = {"cpu": 3e10, "cuda": 1e12}
"""Logits from which on compiling the statistics (15 s) pays: measured on a CPU (0.7 ns a logit), estimated for CUDA."""
STEP_COLUMNS = ("step_tokens", "step_surprisal", "step_first_surprisal")
MEANS = {"loss": "sum_surprisal", "brier": "sum_brier", "entropy": "sum_entropy"}
"""Means over the span and the sums they come from."""
TOKEN_COLUMNS = ("token_surprisal", "token_rank", "token_entropy", "token_log_sum_p2")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured and how the pass is cut.

    top_k: null = exact Brier score; 50 = as LARK's released code computes it.
    keep: sums | tokens (also one value a token: surprisal, rank, entropy, ln sum p^2).
    span: content | authors; step_splitter: sentences | blank_lines; skip: first tokens of a step told apart.
    batch_tokens: tokens of one forward pass, padding included; null = as many as memory holds, or serve a CPU best.
    shard_rows: rows a file, lost at most by a kill.
    share: what rows begin alike with (their prompt) is computed once for those of one forward pass.
    compile: fuse the statistics of the logits by torch.compile; null = where the pass is long enough to gain by it.
    model: null = the student that is trained; else another option of the model group, whose choice that student then
        gets (is a choice specific to its student?).
    """

    top_k: int | None = None
    keep: str = "sums"
    span: str = "content"
    step_splitter: str = "sentences"
    skip: int = 2
    batch_tokens: int | None = None
    shard_rows: int = 512
    share: bool = True
    compile: bool | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("sums", "tokens"):
            raise LarkError(f"probe.keep={self.keep!r} is unknown; set it to sums or tokens")
        if self.span not in SPANS or self.step_splitter not in STEPS:
            raise LarkError(
                f"probe.span={self.span!r} or probe.step_splitter={self.step_splitter!r} is unknown; "
                f"set span to one of {', '.join(SPANS)} and step_splitter to one of {', '.join(STEPS)}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise LarkError(f"probe.top_k={self.top_k} keeps no logit; set it to null (exact) or at least 1")
        for name, least in (("skip", 0), ("batch_tokens", 1), ("shard_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LarkError(f"probe.{name}={value} is too small; set it to at least {least}")

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
    pool: TokenizedPool
    rows: np.ndarray
    seed: int
    warmup: tuple[tuple[Path, float], ...] = ()


class PassModule(LightningModule):
    """One pass of the student over `work.rows`; predict_step: a unit of rows -> their columns, kept in shards.

    A pass says what its units are, what a batch is and what is measured in it. It may keep gradients: the pass runs
    under no_grad, not in inference mode.
    """

    VERSION: ClassVar[int] = 1
    """Raised by hand when the columns come out otherwise for the same student and tokens."""
    SPLITS: ClassVar[bool] = True
    """Whether a unit that does not fit into memory may be measured in parts."""
    CUTS_INSIDE: ClassVar[bool] = False
    """Whether a unit is cut by `batch_tokens` once more, inside."""

    def __init__(self, *, wanted: Pass, work: Work, folder: Path):
        super().__init__()
        self.wanted, self.work, self.folder = wanted, work, folder
        self.student_model: Any = None
        self.parallelism = Parallelism()
        self.buffer: list[dict[str, Any]] = []
        self.computed_tokens = 0  # of the unit at work
        self.lowered = False  # batch_tokens, since memory ran out

    @classmethod
    def identity(cls, wanted: Pass, work: Work) -> dict[str, Any]:
        """What the columns depend on besides the student, its tokens and the sources."""
        return wanted.identity()

    def load(self, device: torch.device) -> torch.nn.Module:
        """The student, in eval mode and frozen."""
        dtype = self.work.student.resolve_dtype(device)
        return self.work.student.load_model(dtype, merge=dtype == torch.float32).eval().requires_grad_(False)

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass; the same on every rank, as units are cut by them."""
        asked = self.work.probe.batch_tokens
        own = estimate_scoring_tokens(self.student_model, self.device) if asked is None else asked
        return self.trainer.strategy.broadcast(own)

    @cached_property
    def not_shared(self) -> str | None:
        """None if rows that begin alike share that part's computation (which changes the student's attention), else why
        not; the same on every rank.
        """
        if not self.work.probe.share:
            return "probe.share=false"
        return self.trainer.strategy.broadcast(enable_prefix_sharing(self.student_model, self.work.student.attention))

    @cached_property
    def not_compiled(self) -> str | None:
        """None if the token statistics are compiled, else why not. Raises LarkError where it was asked for in vain."""
        probe, head = self.work.probe, get_head(self.student_model)
        scored = int(self.work.pool.span_tokens[self.work.rows].sum()) // self.trainer.world_size
        least = COMPILE_FROM.get(self.device.type, math.inf)
        if probe.top_k is not None or probe.compile is False:
            return "probe.compile=false" if probe.compile is False else "probe.top_k is set"
        if probe.compile is None and scored * head.weight_VD.shape[0] < least:
            return "it would take longer than it saves"
        reason = find_compile_failure(self.device)
        if reason and probe.compile:
            raise LarkError(f"probe.compile=true, but torch.compile fails here ({reason}); set it to null or false")
        return reason

    def choices(self) -> dict[str, Any]:
        """What was chosen for this device and pool, as far as the pass came to ask; none of it changes a column by more
        than rounding.
        """
        asked = vars(self)  # where a cached_property keeps its value
        chosen: dict[str, Any] = {}
        if "batch_tokens" in asked:
            chosen["tokens at a time"] = self.batch_tokens
        if "not_shared" in asked:
            chosen["prompts"] = f"not shared ({self.not_shared})" if self.not_shared else "shared"
        if "not_compiled" in asked:
            chosen["statistics"] = f"not compiled ({self.not_compiled})" if self.not_compiled else "compiled"
        if self.lowered:
            chosen["out of memory"] = "tokens at a time were lowered"
        return chosen

    def hidden(self, micro: MicroBatch) -> torch.Tensor:
        """Last hidden states [X, D] of a micro-batch, whose tokens are counted."""
        self.computed_tokens += micro.tokens
        return compute_hidden_states(self.student_model, micro.input_ids_RL, micro.position_ids_RL, micro.tree)

    def units(self) -> list[np.ndarray]:
        """Rows that are computed together; a unit is never split over ranks or files. The worst for memory first."""
        return self.cut(self.work.rows)

    def cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """`rows` in pieces of `batch_tokens`."""
        pool, border = self.work.pool, find_rope_border(self.student_model)
        long = pool.length[rows] > border
        alone, rows = [np.array([row]) for row in rows[long].tolist()], rows[~long]
        if self.not_shared:
            cuts = plan_padded(pool.length[rows], budget=self.batch_tokens)
        else:
            ids, lengths, spans = pool.problem_id[rows], pool.length[rows], pool.span_tokens[rows]
            cuts = plan_prefix_units(ids, lengths, spans, budget=self.batch_tokens)
        return alone + [rows[piece] for piece in cuts if len(piece)]

    def batch(self, rows: np.ndarray) -> Any:
        """What `measure` gets for a unit."""
        lay_out = collate if self.not_shared else collate_prefix_tree
        return lay_out(self.work.pool.read_tokens(rows), rows.tolist())

    def measure(self, batch: Any) -> list[dict[str, Any]]:
        """The columns of a batch, one dict a row with its number under "row"; arrays are lists in the file."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def configure_model(self) -> None:
        if self.student_model is None:
            self.parallelism = Parallelism(self.trainer)
            if self.wanted.needs_gradients:
                self.parallelism.check_gradients(self.wanted.name)
            self.student_model = self.load(self.trainer.strategy.root_device)
            if self.parallelism.is_divided:
                if type(self).units is PassModule.units or isinstance(self.wanted, HeadGradients):
                    _ = self.not_shared  # tried while the student is whole: sharded, no forward pass may fail
                self.parallelism.divide_layers(self.student_model)

    def teardown(self, stage: str) -> None:
        """After the last unit: under sharding a rank that is done takes part in the forward passes of the others."""
        self.parallelism.finish_forward_passes()

    def predict_dataloader(self) -> DataLoader:
        """This rank's units that no shard holds yet."""
        done_N = np.bincount(read_row_numbers(self.folder), minlength=len(self.work.pool.length)) > 0
        self.trainer.strategy.barrier("probe-listed")  # nobody writes before everybody has listed
        # All rows are cut, not only the remaining ones: a resumed pass computes the very batches it would have.
        remaining = [unit[~done_N[unit]] for unit in self.units()]
        mine = [unit for unit in remaining if len(unit)][self.trainer.global_rank :: self.trainer.world_size]
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have none
        return DataLoader(_Batches(mine, self.batch), batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A unit's rows stay; of its batch, micro-batches move, alone or in a list (what else it holds cannot)."""
        rows, content = batch
        return rows, _moved(content, device)

    def predict_step(self, batch: tuple[np.ndarray, Any], batch_idx: int) -> int:
        start = time.monotonic()
        # The student's own dtype decides, and is what the cache is keyed by; the Trainer's precision is for training.
        with torch.autocast(self.device.type, enabled=False):
            measured = self._within_memory(*batch)
        seconds = (time.monotonic() - start) / len(measured)
        each, rest = divmod(self.computed_tokens, len(measured))
        self.computed_tokens = 0
        for i, row in enumerate(measured):
            computed = each + (rest if i == 0 else 0) or row.get("forward_tokens", 0)
            self.buffer.append({"backward_tokens": 0, "computed_tokens": computed, "seconds": seconds} | row)
        if len(self.buffer) >= self.work.probe.shard_rows:
            self._write()
        return len(measured)  # Lightning warns of a step that returns nothing

    def _within_memory(self, rows: np.ndarray, batch: Any = None) -> list[dict[str, Any]]:
        """`measure`; where memory runs out, again with half as many tokens at a time, as all units from then on."""
        if self.lowered and self.SPLITS and len(pieces := self.cut(rows)) > 1:
            return [row for piece in pieces for row in self._within_memory(piece)]
        try:
            return self.measure(_moved(self.batch(rows), self.device) if batch is None else batch)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and (self.SPLITS or self.CUTS_INSIDE)):
                raise
            reason = str(error).partition("\n")[0]
        # here the error, and with it the tensors that its frames hold, is gone
        del batch
        release_memory(self.device)
        tokens = int(self.work.pool.length[rows].sum())
        if self.batch_tokens <= LEAST_TOKENS if self.CUTS_INSIDE else len(rows) == 1:
            raise LarkError(
                f"{self.wanted.name}: {len(rows)} {'trajectory' if len(rows) == 1 else 'trajectories'} of {tokens:,} "
                f"tokens and the student do not fit into memory ({reason}); lower task.max_length, or use "
                "model.dtype=bfloat16, a larger device or trainer=fsdp"
            )
        self.lowered = True
        self.__dict__["batch_tokens"] = min(self.batch_tokens, tokens) // 2
        return self._within_memory(rows)

    def on_predict_end(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.buffer:
            write_rows(self.folder, self.buffer, rank=self.global_rank)
            self.buffer = []


def _as_it_is(batch: Any) -> Any:
    """Not PyTorch's default, which would make tensors of the row numbers."""
    return batch


def _moved(content: Any, device: torch.device) -> Any:
    if isinstance(content, list):
        return [_moved(part, device) for part in content]
    return content.to(device) if isinstance(content, MicroBatch) else content


class _Batches(torch.utils.data.Dataset):
    def __init__(self, units: Sequence[np.ndarray], batch: Callable[[np.ndarray], Any]):
        self.units, self.batch = units, batch

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Any:
        return self.units[index], self.batch(self.units[index])


class ProbeModule(PassModule):
    """The statistics: one forward pass, token statistics in chunks of the vocabulary, sums a trajectory."""

    @classmethod
    def identity(cls, wanted: Pass, work: Work) -> dict[str, Any]:
        return wanted.identity() | work.probe.identity()

    @torch.inference_mode()
    def measure(self, batch: MicroBatch) -> list[dict[str, Any]]:
        hidden_XD = self.hidden(batch)
        tokens = compute_token_statistics(
            hidden_XD[batch.predict_N],
            batch.target_N,
            get_head(self.student_model),
            top_k=self.work.probe.top_k,
            compiled=self.not_compiled is None,
        )
        encoded = self.work.pool.read_tokens(np.array(batch.rows))
        ends = torch.tensor([row.end_of_turn for row in encoded], device=batch.target_N.device)
        sums = sum_by_trajectory(tokens, batch.row_N, batch.position_N, ends, rows=len(encoded))
        return table_rows(batch, encoded, sums, tokens, self.work.probe)


def table_rows(
    batch: MicroBatch,
    encoded: list[TokenizedTrajectory],
    sums: dict[str, torch.Tensor],
    tokens: TokenStatistics,
    probe: Probe,
) -> list[dict[str, Any]]:
    means = {mean: sums[total] / sums["num_tokens"] for mean, total in MEANS.items()}
    columns = {name: values.tolist() for name, values in {**sums, **means}.items()}
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
        record |= zip(STEP_COLUMNS, sum_by_step(surprisal_T, source.steps, end, skip=probe.skip), strict=True)
        if probe.keep == "tokens":
            record |= {name: array[i] for name, array in zip(TOKEN_COLUMNS, by_row, strict=True)}
        rows.append(record)
    return rows


def measure(
    trainer: Trainer, module: PassModule, identity: dict[str, Any], *, before: Mapping[str, float] | None = None
) -> None:
    """Run the pass over every row under `trainer` and complete the cache folder (rank 0 merges).

    The manifest says what it cost: tokens through the student forwards and backwards; those that were computed (shared
    ones once, padding too); device-seconds at work (model loading and waiting not counted); those of an interrupted
    pass included, and what had to be done `before`. And it says what the pass chose by itself, and how fast it was.
    """
    module.folder.mkdir(parents=True, exist_ok=True)
    resumed = len(np.unique(read_row_numbers(module.folder)))
    trainer.predict(module, return_predictions=False)
    trainer.strategy.barrier("probe-written")
    throughput = total_progress(trainer)
    if trainer.is_global_zero:
        cost = merge_parts(module.folder, module.work.rows, summed=COST_COLUMNS)
        cost = {name: value + (before or {}).get(name, 0) for name, value in cost.items()}
        counts = {"rows": len(module.work.rows), "resumed_rows": resumed}
        facts = {"identity": identity, **counts, **cost, **throughput, "choices": module.choices()}
        write_json(module.folder / "manifest.json", facts)
        for part in list_parts(module.folder):  # not before the folder is complete
            part.unlink()
    module.student_model = None  # the next pass loads its own
    gc.collect()  # a student refers to itself
    release_memory(module.device)
    trainer.strategy.barrier("probe-complete")
