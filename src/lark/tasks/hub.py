"""Pools that others have published: a data set of the hub, or local files, with right answers from elsewhere."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lark.common.errors import LarkError
from lark.common.hub import HubError, data_set_errors, download_dataset, find_commit, is_hub_id
from lark.pool.files import READERS, find_files, hash_files, keep_data_files
from lark.tasks.importer import Importer, RowList
from lark.tasks.merging import ReferenceAnswers, read_reference_answers
from lark.tasks.task import Task

DATA_FILES = tuple(f"*{ending}" for ending in READERS)
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


@dataclass(frozen=True, kw_only=True)
class HubTask(Task):
    """A pool in someone else's form: a local file or folder, or the id of a data set of the hub.

    `system` is also the system turn of pool prompts that are made of a problem's text.
    """

    revision: str | None = None
    """The pool's commit on the hub (or a branch, whose commit is then looked up and stored)."""
    config: str | None = None
    """The data set's configuration, on the hub."""
    split: str = "train"
    """The data set's split: of a folder, the files named after it, or all where none is named after any."""
    answers: str | None = None
    """Data set of the hub, or file, with right answers by the problem's text, for where the pool has none."""
    answers_revision: str | None = None
    """Its commit on the hub."""
    rows: int | None = None
    """Read only as many rows of each list; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pool, str | Path):
            raise LarkError(f"task.pool={self.pool} is neither a file, folder nor data set of the hub; set it to one")
        if self.rows is not None and self.rows < 1:
            raise LarkError(f"task.rows={self.rows} leaves no row; set it to 1 or more, or null for all")

    def plan_import(self) -> Importer:
        if is_hub_id(self.pool):
            commit = find_commit(self.pool, self.revision, setting="task.pool")
            identity: dict[str, Any] = {"hub": self.pool, "commit": commit, "config": self.config, "split": self.split}
            return self._make_importer(identity, lambda: iter([self._stream_rows(commit)]))
        if self.config is not None:
            raise LarkError(
                f"task.config={self.config} is for the hub, and task.pool={self.pool} is a path; leave it out"
            )
        return self._make_file_importer(self._find_split_files())

    def _make_importer(self, identity: dict[str, Any], open_lists: Any, **changes: Any) -> Importer:
        answers = self._identify_answers()
        return super()._make_importer(
            identity,
            open_lists,
            rows=self.rows,
            answers=answers,
            read_answers=lambda: self._read_answers(answers),
            **changes,
        )

    def _find_split_files(self) -> dict[str, Path]:
        """Return the local files of the split. Raises LarkError where there are none."""
        root = Path(self.pool).expanduser().absolute()
        if not root.is_dir():
            return find_files(self.pool, setting="task.pool")
        files = {path.relative_to(root).as_posix(): path for path in keep_data_files(root.rglob("*"))}
        words = {name: _SPLITS & set(re.split(r"[^a-z]+", name.lower())) for name in files}
        if any(words.values()) or self.split != "train":
            files = {name: path for name, path in files.items() if self.split in words[name]}
        if not files:
            raise LarkError(f"task.pool={self.pool} has no file of task.split={self.split}; correct one of them")
        return files

    def _stream_rows(self, commit: str) -> RowList:
        """Open a data set of the hub; nothing but the row groups at hand is held."""

        def stream() -> Iterator[dict[str, Any]]:
            from datasets import load_dataset
            from datasets.exceptions import DatasetsError

            try:
                with data_set_errors(str(self.pool), commit, setting="task.pool"):
                    yield from load_dataset(self.pool, self.config, split=self.split, revision=commit, streaming=True)
            except HubError:
                raise
            except (DatasetsError, ValueError, OSError, pa.ArrowException) as error:
                raise LarkError(
                    f"task.pool={self.pool} (task.config={self.config}, task.split={self.split}) cannot be read: "
                    f"{str(error).splitlines()[0]}; correct it"
                ) from error

        return RowList(name=str(self.pool), rows=enumerate(stream(), start=1))

    def _identify_answers(self) -> dict[str, Any] | None:
        if self.answers is None:
            return None
        if is_hub_id(self.answers):
            return {"commit": find_commit(self.answers, self.answers_revision, setting="task.answers")}
        return {"files": hash_files(find_files(self.answers, setting="task.answers"), setting="task.answers")}

    def _read_answers(self, identity: dict[str, Any] | None) -> ReferenceAnswers:
        if self.answers is None or identity is None:
            return ReferenceAnswers()
        if "commit" in identity:
            folder = download_dataset(self.answers, identity["commit"], DATA_FILES, setting="task.answers")
            files = {path.relative_to(folder).as_posix(): path for path in keep_data_files(folder.rglob("*"))}
        else:
            files = find_files(self.answers, setting="task.answers")
        return read_reference_answers(files, shown=f"task.answers={self.answers}")
