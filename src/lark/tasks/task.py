"""Tasks: where the pool and the evaluation sets come from, how long rows may be, how answers are checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.answers.checker import KINDS
from lark.common.cache import hold_lock, identity_hash, is_complete, write_json
from lark.common.errors import LarkError
from lark.common.versions import formula_versions

OVERLONG = ("drop", "truncate", "error")
OVERLAPS = ("report", "drop", "error")
HUB = "hub"  # a benchmark's file in task.eval: from its pinned commit

Say = Callable[[str], None]
"""How derived facts reach the user (print on rank 0, nothing elsewhere)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pool and evaluation sets in files.

    pool: file, folder, glob or list of these with trajectories.
    eval: one file; evaluation sets by name, {name: file}; benchmarks by name, [aime24, math500], or that as text,
        "aime24, math500" (in a task's file: any other form can take its place on the command line). Where a name is a
        benchmark's, its file is read as such, and the file `hub` means the pinned commit of the hub.
    checker: how an answer is checked: math | number | reasoning_gym | exact; pattern: where it stands if not boxed.
    system: system turn of evaluation prompts (the pool's rows bring their own).
    held_out: share of the pool's problems kept for held-out loss, 0 to 1.
    limit, eval_limit: at most this many problems of the pool, of each evaluation set.
    max_length: tokens of a whole row, for scoring and training; overlong: drop | truncate | error.
    max_new_tokens: longest answer when evaluating.
    on_error: raise | drop rows that break the schema.
    overlap: report | drop | error: what becomes of problems of the pool that evaluation sets ask too (lark.pool.contamination).
    """

    name: str
    pool: Any
    eval: str | dict[str, str | None] | list[str] | None = None
    checker: str = "math"
    pattern: str | None = None
    system: str | None = None
    held_out: float = 0.1
    limit: int | None = None
    eval_limit: int | None = None
    max_length: int = 4096
    overlong: str = "drop"
    max_new_tokens: int = 1024
    on_error: str = "raise"
    overlap: str = "report"

    def __post_init__(self) -> None:
        if not isinstance(self.pool, str | Path | list) and type(self) is Task:
            raise LarkError(f"task.pool={self.pool} is no file; set it to a file, folder, glob or list of these")
        if self.checker not in KINDS:
            raise LarkError(f"task.checker={self.checker!r} is unknown; set it to one of {', '.join(KINDS)}")
        if self.overlap not in OVERLAPS:
            raise LarkError(f"task.overlap={self.overlap!r} is unknown; set it to one of {', '.join(OVERLAPS)}")
        if self.overlong not in OVERLONG:
            raise LarkError(f"task.overlong={self.overlong!r} is unknown; set it to one of {', '.join(OVERLONG)}")
        if self.on_error not in ("raise", "drop"):
            raise LarkError(f"task.on_error={self.on_error!r} is unknown; set it to raise or drop")
        if not 0 <= self.held_out < 1:
            raise LarkError(f"task.held_out={self.held_out} is no share of problems; set it from 0 to below 1")
        for name in ("limit", "eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LarkError(f"task.{name}={value} leaves no problem; set it to 1 or more, or null for all")
        if self.max_length < 2 or self.max_new_tokens < 1:
            raise LarkError(
                f"task.max_length={self.max_length} and task.max_new_tokens={self.max_new_tokens} leave no room for an "
                "answer; set them to at least 2 and 1 tokens"
            )

    def sources(self, cache: Path, say: Say = print) -> tuple[Any, dict[str, Path]]:
        """Where the pool is, and the evaluation files by name; both are written to `cache` where they do not exist yet.

        say: gets a line for each thing that had to be made of others' files.
        Raises LarkError naming the setting for what cannot be had or read.
        """
        return self.pool, self.evaluation_files(cache, say)

    def evaluation_files(self, cache: Path, say: Say = print) -> dict[str, Path]:
        """The evaluation files by name; the pool is not touched. Raises LarkError for an unknown benchmark."""
        from lark.benchmarks import is_benchmark, prepare

        if isinstance(self.eval, dict):
            sets = {name: path for name, path in self.eval.items() if path}  # null leaves a set out
        elif isinstance(self.eval, list):
            sets = dict.fromkeys(self.eval, HUB)
        elif self.eval:
            names = [name.strip() for name in self.eval.split(",")]
            sets = dict.fromkeys(names, HUB) if all(map(is_benchmark, names)) else {"eval": self.eval}
        else:
            sets = {}
        return {
            name: prepare(name, None if path == HUB else path, cache, say)
            if path == HUB or is_benchmark(name)
            else Path(path)
            for name, path in sets.items()
        }

    def dropped(self, cache: Path) -> dict[str, int]:
        """Reason -> rows that never reached the pool's file, known once `sources` has made it."""
        return {}


@dataclass(frozen=True, kw_only=True)
class EmbeddedTask(Task):
    """A task that writes its own files: `generate(folder, **settings)` gives pool.jsonl and `<set>.jsonl` files."""

    pool: Any = None
    generate: Callable[..., None]
    sets: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def sources(self, cache: Path, say: Say = print) -> tuple[Any, dict[str, Path]]:
        folder = self._folder(cache)
        pool = folder / "pool.jsonl" if self.pool is None else self.pool  # a pool of the user's own is welcome
        return pool, self.evaluation_files(cache, say)

    def evaluation_files(self, cache: Path, say: Say = print) -> dict[str, Path]:
        folder = self._folder(cache)
        return {name: folder / file for name, file in self.sets.items()}

    def _folder(self, cache: Path) -> Path:
        """Where `generate` has written the files, now or before."""
        identity = {"settings": self.settings, **formula_versions("arithmetic", libraries=("reasoning-gym",))}
        folder = cache / "tasks" / f"{self.name}-{identity_hash(identity)}"
        with hold_lock(folder):
            if not is_complete(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self.generate(folder, **self.settings)
                write_json(folder / "manifest.json", identity)
        return folder
