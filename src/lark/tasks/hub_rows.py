"""Pools in any data set of the hub, or in files of any form that `datasets` reads, by the names of their columns."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lark.common.errors import LarkError
from lark.pool.rows import RowError
from lark.tasks.conversations import read_candidates
from lark.tasks.hub import HubError, commit_of, hub_errors, is_hub_id
from lark.tasks.imported import Found, ImportedTask, hashes


@dataclass(frozen=True, kw_only=True)
class HubRows(ImportedTask):
    """Any data set that `datasets.load_dataset` reads, on the hub or in a local file or folder, by its columns.

    config, split: of the data set.
    """

    config: str | None = None
    split: str = "train"

    def _origin(self) -> dict[str, Any]:
        if self.columns.trajectory is None and self.columns.messages is None:
            raise LarkError(
                "task.columns.trajectory=null and task.columns.messages=null leave no trajectory; set one of them to "
                "the column that holds it"
            )
        origin: dict[str, Any] = {"config": self.config, "split": self.split}
        if is_hub_id(self.pool):
            return origin | {"hub": self.pool, "commit": commit_of(self.pool, self.revision, setting="task.pool")}
        path = Path(self.pool).expanduser()
        if not path.exists():
            raise LarkError(f"task.pool={self.pool} does not exist here and is no owner/name of the hub; correct it")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        root = path if path.is_dir() else path.parent
        return origin | {"files": hashes({p.relative_to(root).as_posix(): p for p in files})}

    def _found(self, origin: dict[str, Any]) -> Iterator[Found]:
        names: set[str] | None = None
        for number, row in enumerate(islice(self._rows(origin), self.rows)):
            if names is None:
                names = set(row)
                if missing := sorted(set(self.columns.named()) - names):
                    raise LarkError(
                        f"task.columns names {', '.join(missing)}, but {self.pool} has the columns "
                        f"{', '.join(sorted(names))}; correct it"
                    )
            place: dict[str, Any] = {"file": str(self.pool), "line": number + 1, "number": number}
            try:
                for what in read_candidates(row, self.columns, system=self.system):
                    yield Found(what=what, **place)
            except RowError as error:
                yield Found(what=error, **place)

    def _rows(self, origin: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows one at a time; nothing but the row groups at hand is held."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        options: dict[str, Any] = {"split": self.split, "revision": origin.get("commit"), "streaming": True}
        source = str(self.pool)
        if "commit" not in origin:
            path = Path(self.pool).expanduser()
            source = str(path)
            if path.is_file():
                kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix.lower(), "json")
                source, options["data_files"] = kind, {self.split: str(path)}
        try:
            with hub_errors(str(self.pool), origin["commit"], "task.pool") if "commit" in origin else nullcontext():
                yield from load_dataset(source, self.config, **options)
        except HubError:
            raise
        except (DatasetsError, ValueError, OSError, pa.ArrowException) as error:
            raise LarkError(
                f"task.pool={self.pool} (task.config={self.config}, task.split={self.split}) cannot be read: "
                f"{str(error).splitlines()[0]}; correct it"
            ) from error
