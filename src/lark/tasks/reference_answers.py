"""Right answers from a data set of problems with solutions, looked up by the text of the problem."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark.answers.extract import find_boxed
from lark.common.errors import LarkError
from lark.pool.contamination import question_digest
from lark.pool.rows import RowError, read_rows

PROBLEM, ANSWER, SOLUTION = ("problem", "question"), "answer", "solution"
BATCH_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Golds:
    """Digest of a problem's text -> its right answer: 200 bytes a problem, 0.2 GB for NuminaMath-CoT's 860,000."""

    answers: dict[bytes, str]
    unboxed: int
    """Problems without an answer: neither that column nor a \\boxed{...} in the solution."""
    contradicting: set[bytes]
    """Problems that stand there with another answer again; the first one holds."""


def read_golds(files: dict[str, Path], *, shown: str) -> Golds:
    """Read the columns problem (or question), and answer or solution, whose last \\boxed{...} is the answer.

    files: .jsonl, .json or .parquet, by name; of Parquet only these columns are read.   shown: setting and value.
    Raises LarkError for a file that breaks off and if no problem has an answer.
    """
    answers: dict[bytes, str] = {}
    contradicting: set[bytes] = set()
    unboxed = rows = 0
    for file, path in files.items():
        try:
            for row in _rows(path):
                rows += 1
                text = next((row[name] for name in PROBLEM if isinstance(row.get(name), str)), None)
                answer = row.get(ANSWER)
                if answer is None and isinstance(row.get(SOLUTION), str):
                    answer = find_boxed(row[SOLUTION])
                if text is None or answer is None or not str(answer).strip():
                    unboxed += 1
                elif answers.setdefault(question_digest(text), str(answer)) != str(answer):
                    contradicting.add(question_digest(text))
        except RowError as error:
            raise LarkError(f"{shown}: {error.at(file, error.line)}; repair it or set another") from error
    if not answers:
        raise LarkError(
            f"{shown} gives none of its {rows:,} problems an answer; its rows need the columns "
            f"{' or '.join(PROBLEM)}, and {ANSWER} or {SOLUTION} (with a \\boxed{{...}})"
        )
    return Golds(answers=answers, unboxed=unboxed, contradicting=contradicting)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() != ".parquet":
        for line, row in read_rows(path):
            if isinstance(row, RowError):
                row.line = line
                raise row
            if isinstance(row, dict):
                yield row
        return
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in (*PROBLEM, ANSWER, SOLUTION) if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RowError("row", "damaged Parquet", f"cannot be read as Parquet: {error}") from error
