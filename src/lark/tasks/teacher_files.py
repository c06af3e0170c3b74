"""Pools in one file or folder a teacher, such as that of the RSR paper (arXiv 2601.14249)."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.common.hub import download_dataset, find_commit, is_hub_id
from lark.common.log import logger
from lark.pool.files import READERS, find_files, hash_files, keep_data_files
from lark.tasks.conversations import Columns
from lark.tasks.hub import HubTask
from lark.tasks.importer import Importer, RowList, open_files
from lark.tasks.problems import read_problems


@dataclass(frozen=True, kw_only=True)
class TeacherFiles(HubTask):
    """One file a teacher (`<teacher>.jsonl`) or one folder (`<teacher>/<sample>.json`), local or on the hub.

    A row's problem is known by its own text or conversation, or is looked up in `problems` by the row's id or number.
    The samples of a teacher are called by what tells its files' names apart: gen1 of short-sys_5k_gen1.json.
    """

    files: str = "*"
    """Glob of the files inside the pool's folder."""
    teachers: list[str] | None = None
    """Only these; null: all there are."""
    samples: list[str] | None = None
    """Only these; null: all there are."""
    problems: str | None = None
    """File of problems (problem_id, problem, answer) for rows without a problem's text."""

    def plan_import(self) -> Importer:
        problems = find_files(self.problems, setting="task.problems") if self.problems else {}
        identity: dict[str, Any] = {"problems": hash_files(problems, setting="task.problems"), "form": self.files}
        if is_hub_id(self.pool):
            commit = find_commit(self.pool, self.revision, setting="task.pool")
            chosen = {"teachers": self.teachers, "samples": self.samples}
            identity |= {"hub": self.pool, "commit": commit, **chosen}
            find_paths = lambda: self._download_files(commit)  # noqa: E731  (nothing is fetched for a pool that is made)
        else:
            paths = self._choose_files(Path(self.pool).expanduser())
            identity |= {"files": hash_files(paths, setting="task.pool")}
            find_paths = lambda: paths  # noqa: E731
        return self._make_importer(
            identity, lambda: self._open_lists(find_paths()), by_row=True, find_problem=self._find_problem
        )

    def _download_files(self, commit: str) -> dict[str, Path]:
        folder, _, name = self.files.rpartition("/")
        folders = self.teachers if folder and self.teachers is not None else [folder]
        names = [f"*{sample}.*" for sample in self.samples] if self.samples is not None else [name]
        patterns = [f"{folder}/{name}".lstrip("/") for folder in folders for name in names]
        return self._choose_files(download_dataset(self.pool, commit, patterns, setting="task.pool"))

    def _choose_files(self, root: Path) -> dict[str, Path]:
        """Return `teacher/sample` -> file, of the teachers and samples asked for. Raises LarkError for missing ones."""
        if not root.is_dir():
            raise LarkError(f"task.pool={self.pool} is not a folder; set it to that of the teachers' files or folders")
        forms = ["*", "*/*"] if self.files == "*" else [self.files]  # by default the teachers' folders as well
        files = keep_data_files(path for form in forms for path in root.glob(form))
        if not files:
            raise LarkError(
                f"task.pool={self.pool} has no {', '.join(READERS)} file of the form task.files={self.files}; correct "
                "one of them"
            )
        stems = [p.stem for p in files if p.parent != root]
        shared = os.path.commonprefix(stems)  # noqa: RUF071  (of names, not of paths)
        cut = max(shared.rfind(mark) for mark in "_-") + 1
        paths: dict[str, Path] = {}
        for path in files:
            name = path.stem if path.parent == root else f"{path.parent.name}/{path.stem[cut:]}"
            if name in paths:
                raise LarkError(f"task.pool={self.pool}: {path} and {paths[name]} are both {name}; rename one")
            paths[name] = path
        for setting, part in (("teachers", 0), ("samples", 2)):
            if (wanted := getattr(self, setting)) is not None:
                there = {name.partition("/")[part] for name in paths} - {""}
                missing = [value for value in wanted if value not in there]
                if missing or not wanted:
                    raise LarkError(
                        f"task.{setting}={wanted}: {self.pool} has no {', '.join(missing) or 'such'}; choose of "
                        f"{', '.join(sorted(there)) or 'none'}"
                    )
                paths = {name: path for name, path in paths.items() if name.partition("/")[part] in wanted}
        return paths

    def _open_lists(self, paths: dict[str, Path]) -> Iterator[RowList]:
        files = {f"{name}{path.suffix}": path for name, path in paths.items()}
        for name, part in zip(paths, open_files(files), strict=True):
            yield replace(part, teacher=name.partition("/")[0], label=name.replace("/", "-"))

    def _find_problem(self, row: Any, number: int, columns: Columns) -> Mapping[str, Any] | None:
        """Look the row's problem up by its id, else, where the row does not say what is asked, by its number."""
        if not isinstance(row, dict):
            return None
        identifier = row.get(columns.problem_id)
        asks = any(row.get(name) is not None for name in (columns.problem, columns.messages))
        return self._known_problems.get(str(number if identifier is None and not asks else identifier))

    @cached_property
    def _known_problems(self) -> dict[str, dict[str, Any]]:
        if self.problems is None:
            return {}
        return {row["problem_id"]: row for row in read_problems(self.problems, setting="task.problems")}

    def prepare_pool(self, cache: Path) -> Path:
        path = super().prepare_pool(cache)
        samples: dict[str, set[str]] = {}
        for name in read_json(path.with_name("manifest.json"))["lists"]:
            teacher, _, sample = name.rpartition(".")[0].partition("/")
            samples.setdefault(teacher, set()).add(sample)
        every = set.union(*samples.values(), self.samples or ()) - {""}
        for teacher, there in samples.items():
            if "" not in there and (missing := sorted(every - there)):
                logger.info("import: %s lacks %s", teacher, ", ".join(missing))
        return path
