"""Reads a run-*.wandb file: a LevelDB log of protobuf records (wandb ships the schema but no longer a reader)."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # crc32c, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    name: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    """Of plots and tables (by their names, as all nested values) each part."""
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)
    """By `<type>/<name>`, the files by the names they have there."""
    folder: Path = Path()

    def series(self, key: str) -> list[float]:
        return [point[key] for point in self.history if key in point]


def read_wandb(path: Path) -> WandbRun:
    wandb.teardown()  # its service writes files in its own time; it ends only once they are complete
    run = WandbRun(folder=path.parent)
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        if record.HasField("run"):
            run.name, run.group, run.job_type = record.run.display_name, record.run.run_group, record.run.job_type
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            run.history.append({key: json.loads(value) for key, value in items.items()})
        elif record.HasField("summary"):
            for item in record.summary.update:
                first, *rest = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                run.summary[first] = {**run.summary.get(first, {}), rest[0]: value} if rest else value
        elif record.HasField("artifact"):
            files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            run.artifacts[f"{record.artifact.type}/{record.artifact.name}"] = files
    return run


def media(run: WandbRun, key: str) -> Any:
    """A plot or a table as it was logged."""
    return json.loads((run.folder / "files" / run.summary[key]["path"]).read_text())


def records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, parts = 7, []
    while at + HEADER.size <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER.size:
            at += room
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts.append(data[at + HEADER.size : at + HEADER.size + length])
        at += HEADER.size + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
    assert not parts
