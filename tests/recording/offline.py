"""Offline W&B files, read back."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2 as pb


@dataclass
class OfflineRun:
    """What a ``.wandb`` file holds."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def scan_history(self):
        """As the Api's run has it."""
        return self.history


def read_offline(folder: Path) -> OfflineRun:
    """The W&B run in a run's folder; the parts of a resumed one together.

    W&B's own process writes the end of the file some time after ``finish`` has returned: wait for the exit code.
    """
    deadline = time.monotonic() + 60
    while True:
        run, error = OfflineRun(), None
        try:
            for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
                run.exit_code = None
                for data in _records(path.read_bytes()):
                    record = pb.Record()
                    record.ParseFromString(data)
                    _take(run, record)
        except (DecodeError, EOFError) as half:
            error = half
        if run.exit_code is not None:
            return run
        assert time.monotonic() < deadline, f"no finished W&B run in {folder}: {error or 'no exit code'}"
        time.sleep(0.05)


def _records(file: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of 7 bytes: blocks of 32 KB with pieces of checksum, length, kind, bytes."""
    if not file.startswith(b":W&B"):
        raise EOFError(f"no W&B file: {file[:8]!r}")
    position, whole = 7, b""
    while position + 7 <= len(file):
        if 32768 - position % 32768 < 7:  # no piece begins so near to a block's end
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", file, position)
        piece, position = file[position + 7 : position + 7 + length], position + 7 + length
        if len(piece) < length:
            raise EOFError("the last piece is not whole")
        whole = whole + piece if kind in (3, 4) else piece
        if kind in (1, 4):
            yield whole


def _take(run: OfflineRun, record: pb.Record) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            told = record.run
            run.id, run.name, run.group = told.run_id, told.display_name, told.run_group
            run.job_type, run.tags = told.job_type, list(told.tags)
            run.config |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in told.config.update}
        case "history":
            run.history.append({_name(i): json.loads(i.value_json) for i in record.history.item})
        case "summary":
            run.summary |= {_name(i): json.loads(i.value_json) for i in record.summary.update}
        case "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        case "artifact":
            run.artifacts[record.artifact.name] = json.loads(record.artifact.metadata or "{}")
        case "exit":
            run.exit_code = record.exit.exit_code


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
