"""Tables computed from rows part by part: what a killed process has finished is not computed again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from lark.common.cache import atomic_write, hold_lock, identity_hash, is_complete, write_json
from lark.common.progress_line import show_progress

PART_ROWS = 10_000
"""Rows a file: lost at most by a kill."""
BATCH_ROWS, BATCH_BYTES = 1000, 2**24
"""A record batch of a file is written when either is reached. One is in memory at a time. Of mapped ones Arrow keeps
the places, 4 kB a batch, that is 4 bytes a row or more where rows are long.
"""

Compute = Callable[[int, int], Iterator[pa.RecordBatch]]
"""The rows from `start` to `stop` of the table, in order, a few at a time."""


def in_parts(
    folder: Path,
    identity: Mapping[str, Any],
    rows: int,
    schema: pa.Schema,
    worker: Callable[[], AbstractContextManager[Compute]],
    label: str,
) -> datasets.Dataset:
    """A table of `rows` rows, memory-mapped: as cached in `folder`/<hash of the identity>, or computed now.

    worker: opened once if a part is missing; gives what computes one. label: of the progress line.
    Each part is written by rename, the manifest last, under a lock; parts that are there already are kept.
    """
    identity = {**identity, "part_rows": PART_ROWS}
    folder = folder / identity_hash(identity)
    paths = {start: folder / f"part-{start:012}.arrow" for start in range(0, rows, PART_ROWS)}
    if not is_complete(folder):
        with hold_lock(folder):
            for half in folder.glob(".part-*.tmp"):  # what a killed process left
                half.unlink()
            missing = {start: path for start, path in paths.items() if not path.exists()}
            if missing:  # else another process has written them while this one waited
                done = sum(min(PART_ROWS, rows - start) for start in paths.keys() - missing.keys())
                with worker() as compute, show_progress(label, rows, "rows", initial=done) as progress:
                    for start, path in missing.items():
                        stop = min(start + PART_ROWS, rows)
                        with atomic_write(path) as temporary:
                            written = _write(temporary, schema, compute(start, stop), progress.update)
                            assert written == stop - start, f"{written} rows computed for {start} to {stop}"
            if not is_complete(folder):
                write_json(folder / "manifest.json", {"identity": identity, "rows": rows})
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths.values()])


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], advance: Callable[[int], Any]) -> int:
    """The batches as fewer and larger ones; returns the number of rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        pending: list[pa.RecordBatch] = []
        written = 0
        for batch in batches:
            pending.append(batch)
            written += batch.num_rows
            advance(batch.num_rows)
            if sum(b.num_rows for b in pending) >= BATCH_ROWS or sum(b.nbytes for b in pending) >= BATCH_BYTES:
                writer.write_batch(pa.concat_batches(pending))
                pending = []
        if pending:
            writer.write_batch(pa.concat_batches(pending))
    return written
