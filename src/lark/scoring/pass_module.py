"""One pass of the frozen student over the pool: rows in, columns out, cached by identity.

A `PassModule` computes what a `Pass` names (lark.scoring.passes). Rows are computed in units; every `shard_rows` rows a
rank writes them to a file of its own. The cache is complete once its manifest is there; a killed pass continues with
the rows that no file holds yet.

Shapes: N rows of the pool, X positions of a micro-batch, D hidden size.
"""

import gc
import hashlib
import math
import time
from collections.abc import Iterable, Mapping
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
from lark.common.versions import STUDENT_LIBRARIES, formula_versions
from lark.scoring.passes import COST_COLUMNS, Pass
from lark.scoring.progress import total_progress
from lark.student.attention import enable_packed_rows
from lark.student.batching import MicroBatch, lay_out_row, pack_rows, plan_alone, plan_prefix_units
from lark.student.chat import SPANS, STEPS
from lark.student.context_length import find_rope_border
from lark.student.distributed import Parallelism
from lark.student.memory import LEAST_TOKENS, estimate_scoring_tokens, is_out_of_memory, release_memory
from lark.student.model_parts import compile_layers, compute_hidden_states, get_head
from lark.student.student import Student
from lark.student.token_statistics import VERSION, find_compile_failure
from lark.student.tokenized_pool import TokenizedPool

COMPILE_FROM = {"cpu": 3e10, "cuda": 0}
"""Logits from which on compiling the statistics pays: 15 s, measured on a CPU (0.7 ns a logit); on CUDA, always."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The settings `probe.*`: what is measured, and how a pass is cut."""

    top_k: int | None = None
    """null = exact Brier score; 50 = as LARK's released code computes it."""
    keep: str = "sums"
    """sums | tokens: also one value a token (surprisal, rank, entropy, ln sum p^2)."""
    span: str = "content"
    """content | authors."""
    step_splitter: str = "sentences"
    skip: int = 2
    """First tokens of a step that are summed apart."""
    batch_tokens: int | None = None
    """Tokens of one forward pass; null = as many as memory holds, or serve a CPU best."""
    shard_rows: int = 512
    """Rows a file, lost at most by a kill."""
    share: bool = True
    """Compute what rows begin alike with (their prompt) once for those of one forward pass."""
    compile: bool | None = None
    """Fuse the statistics of the logits by torch.compile (on CUDA the student's layers too); null = where the pass is
    long enough to gain by it."""
    model: str | None = None
    """null = the student that is trained; else another option of the model group, whose choice that student then gets
    (is a choice specific to its student?)."""

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
        """Return the settings that change a statistic (how the pass is cut does not)."""
        settings = {name: getattr(self, name) for name in ("top_k", "keep", "span", "step_splitter", "skip")}
        return settings | {"statistics": VERSION}


@dataclass(frozen=True, kw_only=True)
class PassInputs:
    """Holds what a pass works on."""

    student: Student
    settings: ScoringSettings
    pool: TokenizedPool
    rows: np.ndarray
    """The rows of `pool` that are measured, ascending [N]."""
    seed: int
    """The arm's, on which LoRA's start and whatever a pass draws depend."""
    warmup: tuple[tuple[Path, float], ...] = ()
    """Checkpoints of a warm-up arm with their learning rates, where a pass needs one."""


class PassModule(LightningModule):
    """Computes one pass over `inputs.rows`; predict_step: a unit of rows -> their columns, kept in parts.

    A subclass says what its units are and what is measured of one. It may keep gradients: the pass runs under no_grad,
    not in inference mode.
    """

    VERSION: ClassVar[int] = 1
    """Raised by hand when the columns come out otherwise for the same student and tokens."""
    SPLITS: ClassVar[bool] = True
    """Whether a unit that does not fit into memory may be measured in parts."""
    CUTS_INSIDE: ClassVar[bool] = False
    """Whether `measure` cuts a unit by `batch_tokens` once more."""

    def __init__(self, *, wanted: Pass, inputs: PassInputs, folder: Path):
        super().__init__()
        self.wanted: Any = wanted  # each subclass knows its kind of pass
        self.inputs, self.folder = inputs, folder
        self.student_model: Any = None
        self.parallelism = Parallelism()
        self.buffer: list[dict[str, Any]] = []
        self.waiting: tuple[Iterable[dict[str, Any]], int, float] | None = None
        """The last unit: its columns to come, the tokens computed, and the seconds spent so far."""
        self.computed_tokens = 0  # of the unit at work
        self.tokens_reduced = False  # whether memory ran out at `batch_tokens`

    @classmethod
    def identity(cls, wanted: Pass, inputs: PassInputs) -> dict[str, Any]:
        """Return what the columns depend on besides the student and its tokens."""
        return wanted.identity()

    @classmethod
    def resolve_dtype(cls, student: Student, device: torch.device) -> torch.dtype:
        return student.resolve_dtype(device)

    def measure(self, rows: np.ndarray) -> Iterable[dict[str, Any]]:
        """Compute the columns of a unit, one dict a row with its number under "row"; arrays become lists in the
        file. What waits for the device may wait until the rows are asked for, one unit later.
        """
        raise NotImplementedError

    def plan_units(self) -> list[np.ndarray]:
        """Divide the rows into units, which are never split over ranks or files; the worst for memory first."""
        return self.plan_batches(self.inputs.rows)

    def load_student(self, device: torch.device) -> torch.nn.Module:
        """Load the student in eval mode and frozen."""
        dtype = self.resolve_dtype(self.inputs.student, device)
        return self.inputs.student.load_model(dtype, merge=dtype == torch.float32).eval().requires_grad_(False)

    # ---- what is chosen for this device and pool; none of it changes a column by more than rounding

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass; the same on every rank, as units are cut by them."""
        asked = self.inputs.settings.batch_tokens
        own = estimate_scoring_tokens(self.student_model, self.device) if asked is None else asked
        return self.parallelism.find_least(own)

    @cached_property
    def unpacked_reason(self) -> str | None:
        """None if the student takes packed rows (which changes its attention), else why one row goes alone; the same on
        every rank, where any of them refuses.
        """
        reason = self.parallelism.find_refusal(enable_packed_rows(self.student_model, self.inputs.student.attention))
        if reason is None and self.inputs.settings.compile is not False:
            compile_layers(self.student_model, self.trainer.strategy.root_device)
        return reason

    @property
    def sharing_disabled_reason(self) -> str | None:
        """None if rows that begin alike share that part's computation, else why not."""
        return self.unpacked_reason if self.inputs.settings.share else "probe.share=false"

    @cached_property
    def compile_disabled_reason(self) -> str | None:
        """None if the token statistics are compiled, else why not. Raises LarkError where it was asked for in vain."""
        settings, head = self.inputs.settings, get_head(self.student_model)
        scored = int(self.inputs.pool.span_tokens[self.inputs.rows].sum()) // self.trainer.world_size
        least = COMPILE_FROM.get(self.device.type, math.inf)
        if settings.compile is False:
            return "probe.compile=false"
        if settings.top_k is not None:
            return "probe.top_k is set"
        if settings.compile is None and scored * head.weight_VD.shape[0] < least:
            return "it would take longer than it saves"
        reason = find_compile_failure(self.device)
        if reason and settings.compile:
            raise LarkError(f"probe.compile=true, but torch.compile fails here ({reason}); set it to null or false")
        return reason

    def list_choices(self) -> dict[str, Any]:
        """List what was chosen, as far as the pass came to ask."""
        known = vars(self)  # where a cached_property keeps its value
        chosen: dict[str, Any] = {}
        if "batch_tokens" in known:
            chosen["tokens at a time"] = self.batch_tokens
        if "unpacked_reason" in known:
            chosen["prompts"] = _describe("shared", self.sharing_disabled_reason)
        if "compile_disabled_reason" in known:
            chosen["statistics"] = _describe("compiled", self.compile_disabled_reason)
        if self.tokens_reduced:
            chosen["out of memory"] = "tokens at a time were lowered"
        return chosen

    # ---- batches

    def plan_batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """Divide `rows` into pieces of `batch_tokens`."""
        pool, border = self.inputs.pool, find_rope_border(self.student_model)
        if self.unpacked_reason:
            return [rows[piece] for piece in plan_alone(pool.length[rows])]
        long = pool.length[rows] > border  # beyond it positions are scaled by the longest row: such rows go alone
        alone, rows = [np.array([row]) for row in rows[long].tolist()], rows[~long]
        ids, lengths, spans = pool.problem_id[rows], pool.length[rows], pool.span_tokens[rows]
        counted = spans if self.inputs.settings.share else lengths
        return alone + [rows[piece] for piece in plan_prefix_units(ids, lengths, counted, budget=self.batch_tokens)]

    def collate(self, rows: np.ndarray) -> MicroBatch:
        """Lay rows out as one micro-batch on the student's device."""
        tokenized = self.inputs.pool.read_tokens(rows)
        if self.unpacked_reason:
            (row,), (number,) = tokenized, rows.tolist()
            return lay_out_row(row, number).to(self.device)
        return pack_rows(tokenized, rows.tolist(), share=self.inputs.settings.share).to(self.device)

    def compute_hidden(self, micro: MicroBatch) -> torch.Tensor:
        """Compute the last hidden states [X, D] of a micro-batch, whose tokens are counted."""
        self.computed_tokens += micro.tokens
        return compute_hidden_states(self.student_model, micro.input_ids_1X, micro.position_ids_1X, micro.tree)

    # ---- Lightning's hooks

    def configure_model(self) -> None:
        if self.student_model is None:
            self.parallelism = Parallelism(self.trainer)
            if self.wanted.needs_gradients:
                self.parallelism.check_gradients(self.wanted.name)
            self.student_model = self.load_student(self.trainer.strategy.root_device)
            if self.parallelism.is_divided:
                _ = self.unpacked_reason  # tried while the student is whole: divided, no forward pass may fail
                self.parallelism.divide_layers(self.student_model)

    def predict_dataloader(self) -> DataLoader:
        """Iterate over this rank's units, without the rows that a part holds already."""
        done_N = np.bincount(read_row_numbers(self.folder), minlength=len(self.inputs.pool.length)) > 0
        self.trainer.strategy.barrier("pass-listed")  # nobody writes before everybody has listed
        # All rows are cut, not only the remaining ones: a resumed pass computes the very batches it would have.
        remaining = [unit[~done_N[unit]] for unit in self.plan_units()]
        mine = [unit for unit in remaining if len(unit)][self.trainer.global_rank :: self.trainer.world_size]
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have none
        return DataLoader(mine, batch_size=None, collate_fn=_keep_array)  # type: ignore[arg-type]

    def predict_step(self, rows: np.ndarray, batch_idx: int) -> int:
        start = time.monotonic()
        # The student's own dtype decides, and is what the cache is keyed by; the Trainer's precision is for training.
        with torch.autocast(self.device.type, enabled=False):
            measured = self._measure_within_memory(rows)
        spent = time.monotonic() - start
        self._collect_last()  # while the device is at work on this unit
        self.waiting, self.computed_tokens = (measured, self.computed_tokens, spent), 0
        return len(rows)  # Lightning warns of a step that returns nothing

    def _collect_last(self) -> None:
        """Put the last unit's columns into the buffer, and the buffer into a file once it is full."""
        if self.waiting is None:
            return
        (columns, computed_tokens, spent), self.waiting = self.waiting, None
        start = time.monotonic()
        measured = list(columns)
        seconds = (spent + time.monotonic() - start) / len(measured)
        each, rest = divmod(computed_tokens, len(measured))
        for i, row in enumerate(measured):
            computed = each + (rest if i == 0 else 0) or row.get("forward_tokens", 0)
            self.buffer.append({"backward_tokens": 0, "computed_tokens": computed, "seconds": seconds} | row)
        if len(self.buffer) >= self.inputs.settings.shard_rows:
            self._write_buffer()

    def on_predict_end(self) -> None:
        self._collect_last()
        self._write_buffer()

    def teardown(self, stage: str) -> None:
        """Take part in the other ranks' forward passes, where the student is divided."""
        self.parallelism.finish_forward_passes()

    def _write_buffer(self) -> None:
        if self.buffer:
            write_rows(self.folder, self.buffer, rank=self.global_rank)
            self.buffer = []

    def _measure_within_memory(self, rows: np.ndarray) -> Iterable[dict[str, Any]]:
        """Measure a unit; where memory runs out, again with half as many tokens at a time, as all units from then
        on.
        """
        if self.tokens_reduced and self.SPLITS and len(pieces := self.plan_batches(rows)) > 1:
            return [row for piece in pieces for row in self._measure_within_memory(piece)]
        try:
            return self.measure(rows)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and (self.SPLITS or self.CUTS_INSIDE)):
                raise
            reason = str(error).partition("\n")[0]
        # Here the error, and with it the tensors that its frames hold, is gone.
        release_memory(self.device)
        tokens = int(self.inputs.pool.length[rows].sum())
        if self.batch_tokens <= LEAST_TOKENS if self.CUTS_INSIDE else len(rows) == 1:
            raise LarkError(
                f"{self.wanted.name}: {len(rows)} {'trajectory' if len(rows) == 1 else 'trajectories'} of {tokens:,} "
                f"tokens and the student do not fit into memory ({reason}); lower task.max_length, or use "
                "model.dtype=bfloat16, a larger device or trainer=fsdp"
            )
        self.tokens_reduced = True
        self.__dict__["batch_tokens"] = min(self.batch_tokens, tokens) // 2
        return self._measure_within_memory(rows)


def _keep_array(rows: np.ndarray) -> np.ndarray:
    """Stand in for PyTorch's default, which would make a tensor of the row numbers."""
    return rows


def _describe(done: str, disabled_reason: str | None) -> str:
    return f"not {done} ({disabled_reason})" if disabled_reason else done


def identify_pass(wanted: Pass, inputs: PassInputs, device: torch.device) -> dict[str, Any]:
    """Return all that the columns of a pass depend on, but for a warm-up arm's recipe."""
    module = wanted.load_module()
    return {
        "student": inputs.student.identity(),
        "dtype": str(module.resolve_dtype(inputs.student, device)),
        "attention": inputs.student.attention,
        **inputs.pool.identity,
        "rows": hashlib.sha256(inputs.rows.tobytes()).hexdigest(),
        **module.identity(wanted, inputs),
        "versions": formula_versions("tokens", "forward", libraries=STUDENT_LIBRARIES) | {"pass": module.VERSION},
    }


def run_pass(
    trainer: Trainer, module: PassModule, identity: dict[str, Any], *, before: Mapping[str, float] | None = None
) -> None:
    """Run the pass over every row under `trainer` and complete the cache folder (rank 0 merges).

    The manifest says what it cost: tokens through the student forwards and backwards; those that were computed (shared
    ones once); device-seconds at work (model loading and waiting not counted); those of an interrupted
    pass included, and what had to be done `before`. And it says what the pass chose by itself, and how fast it was.
    """
    module.folder.mkdir(parents=True, exist_ok=True)
    resumed = len(np.unique(read_row_numbers(module.folder)))
    trainer.predict(module, return_predictions=False)
    trainer.strategy.barrier("pass-written")
    throughput = total_progress(trainer)
    if trainer.is_global_zero:
        cost = merge_parts(module.folder, module.inputs.rows, summed=COST_COLUMNS)
        cost = {name: value + (before or {}).get(name, 0) for name, value in cost.items()}
        counts = {"rows": len(module.inputs.rows), "resumed_rows": resumed}
        facts = {"identity": identity, **counts, **cost, **throughput, "choices": module.list_choices()}
        write_json(module.folder / "manifest.json", facts)
        for part in list_parts(module.folder):  # not before the folder is complete
            part.unlink()
    module.student_model = None  # the next pass loads its own
    gc.collect()  # a student refers to itself
    release_memory(module.device)
    trainer.strategy.barrier("pass-complete")
