"""Tasks: where the pool and the evaluation sets come from, how long rows may be, how answers are checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.answers.checker import KINDS
from lark.common.cache import build_once, check_name, identity_hash, read_json
from lark.common.errors import LarkError
from lark.common.versions import formula_versions
from lark.pool.files import find_files, hash_files, peek_rows
from lark.tasks.benchmarks import is_benchmark, prepare_benchmark
from lark.tasks.conversations import Columns, collect_samples, is_pool
from lark.tasks.importer import SAMPLE_ROWS, Importer, RowList, log_import, open_files

HUB = "hub"
"""In place of a benchmark's file: from its pinned commit."""
_CHOICES = {
    "checker": KINDS,
    "overlap": ("report", "drop", "error"),
    "overlong": ("drop", "truncate", "error"),
    "on_error": ("raise", "drop"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pool and evaluation sets in files."""

    name: str
    pool: Any
    """File, folder, pattern with * or list of these with trajectories."""
    columns: Columns = field(default_factory=Columns)
    """Which columns hold what, where the rows are not a pool's."""
    eval: str | dict[str, str | None] | list[str] | None = None
    """One file; sets by name, {name: file}; benchmarks by name, [aime24, math500], or that as text, "aime24, math500"
    (for a task's file: any other form can take its place on the command line). A benchmark's file is read as such, and
    the file `hub` means the pinned commit of the hub."""
    checker: str = "math"
    """How an answer is checked: math | number | choice | reasoning_gym | exact."""
    pattern: str | None = None
    """Regular expression whose first group is the answer, where it is not boxed."""
    system: str | None = None
    """System turn of evaluation prompts (the pool's rows bring their own)."""
    held_out: float = 0.1
    """Share of the pool's problems kept for held-out loss, 0 to 1."""
    held_out_rows: int | None = 256
    """Most held-out trajectories, chosen by hash, that the curve on the way is taken over; None: all. Before and after
    training it is all.
    """
    limit: int | None = None
    """At most this many problems of the pool."""
    eval_limit: int | None = None
    """At most this many problems of each evaluation set."""
    max_length: int = 4096
    """Tokens of a whole row, for scoring and training."""
    overlong: str = "drop"
    """What happens to longer rows: drop | truncate | error."""
    max_new_tokens: int = 1024
    """Tokens of the longest answer when evaluating."""
    on_error: str = "raise"
    """What happens to rows that break the schema: raise | drop."""
    overlap: str = "report"
    """What happens to problems that the pool shares with evaluation sets: report | drop | error."""

    def __post_init__(self) -> None:
        if not isinstance(self.pool, str | Path | list) and type(self) is Task:
            raise LarkError(f"task.pool={self.pool} is not a file; set it to a file, folder or list of these")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise LarkError(f"task.{name}={value!r} is unknown; set it to one of {', '.join(choices)}")
        for name in self.eval if isinstance(self.eval, dict) else ():
            check_name(name, "the name of a set in task.eval")
        if not 0 <= self.held_out < 1:
            raise LarkError(f"task.held_out={self.held_out} is not a share of problems; set it from 0 to below 1")
        if self.held_out_rows is not None and self.held_out_rows < 1:
            raise LarkError(
                f"task.held_out_rows={self.held_out_rows} leaves no curve; set it to 1 or more, or null for all"
            )
        for name in ("limit", "eval_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LarkError(f"task.{name}={value} leaves no problem; set it to 1 or more, or null for all")
        if self.max_length < 2 or self.max_new_tokens < 1:
            raise LarkError(
                f"task.max_length={self.max_length} and task.max_new_tokens={self.max_new_tokens} leave no room for an "
                "answer; set them to at least 2 and 1 tokens"
            )

    def check_files(self) -> None:
        """Check that the files that are named are there. Raises LarkError naming the setting."""
        if type(self) is Task:
            find_files(self.pool, setting="task.pool")
        given = self.eval.values() if isinstance(self.eval, dict) else [self.eval] if isinstance(self.eval, str) else []
        for path in given:
            if path and path != HUB and not all(is_benchmark(name.strip()) for name in path.split(",")):
                find_files(path, setting="task.eval")

    def prepare_pool(self, cache: Path) -> Any:
        """Return where the pool's files are; what is made of others' rows is written to `cache` first.

        Raises LarkError naming the setting for what cannot be had or read.
        """
        if (importer := self.plan_import()) is None:
            return self.pool
        folder = importer.build(cache)
        log_import(folder, self.system)
        return folder / "pool.jsonl"

    def count_dropped(self, cache: Path) -> dict[str, int]:
        """Count the rows that never reached the pool's file by reason; known once `prepare_pool` has made it."""
        importer = self.plan_import()
        return {} if importer is None else read_json(importer.build(cache) / "manifest.json")["dropped"]

    def plan_import(self) -> Importer | None:
        """Return how the pool is made of rows in others' forms; None: they are a pool's."""
        files = find_files(self.pool, setting="task.pool")
        if not self.columns.list_names():
            samples = collect_samples(peek_rows(next(iter(files.values())), SAMPLE_ROWS))
            if is_pool(samples) or not samples:  # what cannot be read is told when the pool is read
                return None
        return self._make_file_importer(files)

    def _make_file_importer(self, files: dict[str, Path]) -> Importer:
        return self._make_importer({"files": hash_files(files, setting="task.pool")}, lambda: open_files(files))

    def _make_importer(
        self, identity: dict[str, Any], open_lists: Callable[[], Iterator[RowList]], **changes: Any
    ) -> Importer:
        return Importer(
            name=self.name,
            source=str(self.pool),
            identity=identity,
            open_lists=open_lists,
            columns=self.columns,
            system=self.system,
            on_error=self.on_error,
            **changes,
        )

    def prepare_evaluation(self, cache: Path) -> dict[str, Path]:
        """Return the evaluation files by name; benchmarks are written to `cache` first, the pool is not touched.

        Raises LarkError for an unknown benchmark, or one that cannot be had or read.
        """
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
            name: prepare_benchmark(name, None if path == HUB else path, cache)
            if path == HUB or is_benchmark(name)
            else Path(path)
            for name, path in sets.items()
        }


@dataclass(frozen=True, kw_only=True)
class EmbeddedTask(Task):
    """A task that writes its own files."""

    pool: Any = None
    """A pool of the user's own with this task's evaluation sets; null: the one that is written."""
    generate: Callable[..., None]
    """Called as `generate(folder, **settings)`; writes pool.jsonl and the files of `sets` into the folder."""
    sets: dict[str, str] = field(default_factory=dict)
    """Name of an evaluation set -> its file in the folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `generate`."""

    def prepare_pool(self, cache: Path) -> Any:
        return self._build(cache) / "pool.jsonl" if self.pool is None else super().prepare_pool(cache)

    def plan_import(self) -> Importer | None:
        return None if self.pool is None else super().plan_import()

    def prepare_evaluation(self, cache: Path) -> dict[str, Path]:
        folder = self._build(cache)
        return {name: folder / file for name, file in self.sets.items()}

    def _build(self, cache: Path) -> Path:
        identity = {"settings": self.settings, **formula_versions("arithmetic", libraries=("reasoning-gym",))}
        folder = cache / "tasks" / f"{self.name}-{identity_hash(identity)}"
        build_once(folder, identity, lambda folder: self.generate(folder, **self.settings))
        return folder
