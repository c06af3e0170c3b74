"""Pools in any data set of the hub, or in files of any form that `datasets` reads, by the names of their columns."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from lark.common.errors import LarkError
from lark.common.hub import HubError, data_set_errors, find_commit, is_hub_id
from lark.pool.files import hash_files
from lark.tasks.imported import ImportedTask, RowList


@dataclass(frozen=True, kw_only=True)
class HubTask(ImportedTask):
    """Any data set that `datasets.load_dataset` reads, on the hub or in a local file or folder, by its columns."""

    config: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split."""

    def _identify_pool(self) -> dict[str, Any]:
        if self.columns.trajectory is None and self.columns.messages is None:
            raise LarkError(
                "task.columns.trajectory=null and task.columns.messages=null leave no trajectory; set one of them to "
                "the column that holds it"
            )
        identity: dict[str, Any] = {"config": self.config, "split": self.split}
        if is_hub_id(self.pool):
            commit = find_commit(self.pool, self.revision, setting="task.pool")
            return identity | {"hub": self.pool, "commit": commit}
        path = Path(self.pool).expanduser()
        if not path.exists():
            raise LarkError(f"task.pool={self.pool} does not exist here and is no owner/name of the hub; correct it")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        root = path if path.is_dir() else path.parent
        named = {p.relative_to(root).as_posix(): p for p in files}
        return identity | {"files": hash_files(named, setting="task.pool")}

    def _open_lists(self, identity: dict[str, Any]) -> Iterator[RowList]:
        rows = self._stream_rows(identity.get("commit"))
        first = next(rows, None)
        if first is not None and (missing := sorted(set(self.columns.list_names()) - set(first))):
            raise LarkError(
                f"task.columns names {', '.join(missing)}, but {self.pool} has the columns "
                f"{', '.join(sorted(first))}; correct it"
            )
        rows = chain([] if first is None else [first], rows)
        yield RowList(name=str(self.pool), rows=enumerate(rows, start=1))

    def _stream_rows(self, commit: str | None) -> Iterator[dict[str, Any]]:
        """Yield rows one at a time; nothing but the row groups at hand is held."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        options: dict[str, Any] = {"split": self.split, "revision": commit, "streaming": True}
        source = str(self.pool)
        if commit is None:
            path = Path(self.pool).expanduser()
            source = str(path)
            if path.is_file():
                kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix.lower(), "json")
                source, options["data_files"] = kind, {self.split: str(path)}
        try:
            with data_set_errors(str(self.pool), commit, setting="task.pool") if commit else nullcontext():
                yield from load_dataset(source, self.config, **options)
        except HubError:
            raise
        except (DatasetsError, ValueError, OSError, pa.ArrowException) as error:
            raise LarkError(
                f"task.pool={self.pool} (task.config={self.config}, task.split={self.split}) cannot be read: "
                f"{str(error).splitlines()[0]}; correct it"
            ) from error
