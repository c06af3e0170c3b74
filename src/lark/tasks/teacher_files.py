"""Pools in one file or folder a teacher, such as that of the RSR paper (arXiv 2601.14249)."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lark.common.errors import LarkError
from lark.common.progress_line import show_progress
from lark.pool.pool import PoolError
from lark.pool.rows import READERS, Fault, RowError, find_files, read_rows
from lark.tasks.conversations import read_candidates
from lark.tasks.hub import commit_of, fetched, is_hub_id
from lark.tasks.imported import Found, ImportedTask, data_files, hashes


@dataclass(frozen=True, kw_only=True)
class TeacherFiles(ImportedTask):
    """One file a teacher (`<teacher>.jsonl`) or one folder (`<teacher>/<sample>.json`), local or on the hub.

    A row's problem is known by its own text or conversation, or is looked up in `problems` by the row's id or number.
    The samples of a teacher are called by what tells its files' names apart: gen1 of short-sys_5k_gen1.json.

    files: glob of the files inside the pool's folder.
    teachers, samples: only these (null: all there are).
    problems: evaluation-style file of problems (problem_id, problem, answer) for rows without a problem's text.
    """

    files: str = "*"
    teachers: list[str] | None = None
    samples: list[str] | None = None
    problems: str | None = None

    @property
    def _by_row(self) -> bool:
        return True

    def _origin(self) -> dict[str, Any]:
        problems = find_files(self.problems, setting="task.problems") if self.problems else {}
        origin: dict[str, Any] = {"problems": hashes(problems), "form": self.files}
        if not is_hub_id(self.pool):
            return origin | {"files": hashes(self._chosen(Path(self.pool).expanduser()))}
        commit = commit_of(self.pool, self.revision, setting="task.pool")
        return origin | {"hub": self.pool, "commit": commit, "teachers": self.teachers, "samples": self.samples}

    def _paths(self, origin: dict[str, Any]) -> dict[str, Path]:
        if "commit" not in origin:
            return self._chosen(Path(self.pool).expanduser())
        folder, _, name = self.files.rpartition("/")
        folders = self.teachers if folder and self.teachers is not None else [folder]
        names = [f"*{sample}.*" for sample in self.samples] if self.samples is not None else [name]
        patterns = [f"{folder}/{name}".lstrip("/") for folder in folders for name in names]
        return self._chosen(fetched(self.pool, origin["commit"], patterns, setting="task.pool"))

    def _chosen(self, root: Path) -> dict[str, Path]:
        """`teacher/sample` -> file, of the teachers and samples asked for. Raises LarkError for those not there."""
        if not root.is_dir():
            raise LarkError(f"task.pool={self.pool} is no folder; set it to that of the teachers' files or folders")
        forms = ["*", "*/*"] if self.files == "*" else [self.files]  # by default the teachers' folders as well
        files = data_files(path for form in forms for path in root.glob(form))
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

    def _found(self, origin: dict[str, Any]) -> Iterator[Found]:
        lookup, paths = self._lookup(), self._paths(origin)
        total = sum(path.stat().st_size for path in paths.values()) / 1e6
        with show_progress("importing", total, "MB") as progress:
            for name, path in paths.items():
                teacher = name.partition("/")[0]
                shown, line, number = f"{name}{path.suffix}", None, -1
                try:
                    for number, (line, row) in enumerate(islice(read_rows(path), self.rows)):
                        place = {"file": shown, "line": line, "number": number, "label": name.replace("/", "-")}
                        try:
                            if isinstance(row, RowError):
                                raise row
                            for what in read_candidates(
                                row,
                                self.columns,
                                problem=self._known(row, number, lookup),
                                system=self.system,
                                teacher=teacher,
                            ):
                                yield Found(what=what, **place)
                        except RowError as error:
                            yield Found(what=error, **place)
                except RowError as error:
                    fault: Fault = error.at(shown, error.line)
                    raise PoolError(f"task.pool={self.pool} has a file that breaks off: repair it", [fault]) from error
                if line is None:
                    error = RowError("row", "empty file", "the file holds no row: write rows to it or take it out")
                    yield Found(what=error, file=shown, line=None)
                progress.update(path.stat().st_size / 1e6)

    def _known(self, row: Any, number: int, lookup: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """The problem of a row in `problems`: by its id, else, where it does not say what is asked, by its number."""
        if not isinstance(row, dict):
            return None
        identifier = row.get(self.columns.problem_id)
        says = any(row.get(name) is not None for name in (self.columns.problem, self.columns.messages))
        return lookup.get(str(number if identifier is None and not says else identifier))

    def _lookup(self) -> dict[str, dict[str, Any]]:
        if self.problems is None:
            return {}
        from lark.tasks.problems import read_problems

        return {row["problem_id"]: row for row in read_problems(self.problems, setting="task.problems")}

    def _lines(self, summary: dict[str, Any], dropped: Counter[str]) -> list[str]:
        samples: dict[str, set[str]] = {}
        for name in summary["lists"]:
            teacher, _, sample = name.rpartition(".")[0].partition("/")
            samples.setdefault(teacher, set()).add(sample)
        every = set.union(*samples.values(), self.samples or ()) - {""}
        short = {teacher: sorted(every - there) for teacher, there in samples.items() if "" not in there}
        lacking = "; ".join(f"{teacher} lacks {', '.join(missing)}" for teacher, missing in short.items() if missing)
        return super()._lines(summary, dropped) + ([f"import      {lacking}"] if lacking else [])
