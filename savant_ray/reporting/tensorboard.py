"""TensorBoard event files, derived from the record: numbers of steps, validations, scores and checkpoints, and samples.

Each start of the workers, and each rewind, begins a new file. The file starts with a session log, which makes TensorBoard
ignore all steps of earlier files from a certain step on, and these steps are written again from the record. So no step
appears twice, and events that a killed driver did not flush, or that a full disk refused, are added.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.events import CheckpointSaved, LogicScored, SampleGenerated, StepDone, ValidationDone

if TYPE_CHECKING:  # imported where it is used: the import takes 0.3 s
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

FOLDER = "tensorboard"
REWRITTEN_STEPS = 1000  # before the last one in the files; far more than a power failure can have damaged
RECORD_HEADER = struct.Struct("<Q4x")  # of an event in a file: its length, and a checksum of the length
CHECKSUM_BYTES = 4  # behind an event
FLUSH_SECONDS = 5
NUMERIC_KINDS = (StepDone.kind, ValidationDone.kind, LogicScored.kind, CheckpointSaved.kind)


class TensorBoard:
    """The event files of one run; `error` is the reason if they cannot be written, which never ends the run."""

    # What happens after an `error`; part of the warning about it.
    consequence = "its curves stop until the workers next start; the missing steps are added then"

    def __init__(self, run_folder: Path) -> None:
        self.path, self.error = run_folder / FOLDER, ""
        self._writer: EventFileWriter | None = None

    def begin(self, step: int, lines: Iterable[dict[str, Any]]) -> None:
        """Open a new file at `step`; `lines` are the record up to this step."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close()
        self.error = ""
        first = max(0, min(step, self._last_step()) - REWRITTEN_STEPS)
        with self._errors_recorded():
            self._writer = EventFileWriter(str(self.path), flush_secs=FLUSH_SECONDS)
            self._writer.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            if line.get("step", -1) >= first:
                self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write the numbers of one line of the record."""
        if self._writer is None or not (values := list(_values(line))):
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        wall_time = datetime.fromisoformat(line["time"]).timestamp()
        with self._errors_recorded():
            self._writer.add_event(Event(step=line["step"], wall_time=wall_time, summary=Summary(value=values)))

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            with self._errors_recorded():
                self._writer.close()
        self._writer = None

    def _last_step(self) -> int:
        """Return the newest step in the files, 0 without one."""
        for path in sorted(self.path.glob("events.*"), reverse=True):
            with suppress(OSError):
                if (step := _last_step(path)) is not None:
                    return step
        return 0

    @contextmanager
    def _errors_recorded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error.strerror or str(error)


def _last_step(path: Path) -> int | None:
    """Return the step of the last complete event of a file, None if it was not written as far as its session log.

    Checksums are not verified: TensorBoard's code takes 10 s for 10,000 steps.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    last, size = b"", path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(RECORD_HEADER.size)) == RECORD_HEADER.size:
            (length,) = RECORD_HEADER.unpack(header)
            if not 0 < length <= size - file.tell() - CHECKSUM_BYTES:
                break
            last = file.read(length)
            file.seek(CHECKSUM_BYTES, os.SEEK_CUR)
    try:
        event = Event.FromString(last)
    except Exception:  # protobuf's DecodeError
        return None
    return int(event.step) if event.step or event.HasField("session_log") else None


def _values(line: dict[str, Any]) -> Iterator[Summary.Value]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    kind = line["event"]
    if kind == SampleGenerated.kind:
        yield _text("sample", f"{line['prompt']}{line['text']}")
    for tag, value in numbers(line).items():
        yield Summary.Value(tag=tag, simple_value=value)


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the record as `event/field`, or `event/field/loop` for one value per loop."""
    result: dict[str, float] = {}
    for name, value in line.items() if line["event"] in NUMERIC_KINDS else ():
        by_suffix = (
            {f"/{loop}": loop_value for loop, loop_value in enumerate(value, 1)}
            if isinstance(value, list)
            else {"": value}
        )
        result |= {f"{line['event']}/{name}{suffix}": x for suffix, x in by_suffix.items() if _is_number(x)}
    result.pop(f"{line['event']}/step", None)
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(tag: str, text: str) -> Summary.Value:
    """Return text for TensorBoard's text plugin, indented, because the plugin renders Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    indented = "\n".join(f"    {line}" for line in text.split("\n"))
    return Summary.Value(
        tag=f"{tag}/text_summary",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(dtype="DT_STRING", string_val=[indented.encode()], tensor_shape=shape),
    )
