"""TensorBoard's event files, beside the record and from it: every number of an event under `event/field`.

A launch writes a file of its own, which first takes back what earlier files hold from some step on (TensorBoard's session
log) and then tells it again from the record. So no step is there twice, and what a killed driver had not written yet is
filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savant_ray.events import CheckpointSaved, LogicScored, SampleGenerated, StepDone, ValidationDone

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

FOLDER = "tensorboard"
TOLD_AGAIN = 1000  # steps: far more than a driver has in its hands
FLUSH_SECONDS = 5
WITH_NUMBERS = (StepDone.kind, ValidationDone.kind, LogicScored.kind, CheckpointSaved.kind)


class TensorBoard:
    """The event files of one run. A disk that refuses costs curves, never the run; `refusal` says why."""

    loss = "its curves stand still until the next launch, which fills them in from metrics.jsonl"

    def __init__(self, run_folder: Path) -> None:
        self.path, self.refusal = run_folder / FOLDER, ""
        self._writer: EventFileWriter | None = None

    def begin(self, step: int, lines: Iterable[dict[str, Any]]) -> None:
        """The run stands at `step`; `lines` are its record up to there."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close()
        first = max(0, step - TOLD_AGAIN) if any(self.path.glob("events.*")) else 0
        with self._refusals_noted():
            self._writer = EventFileWriter(str(self.path), flush_secs=FLUSH_SECONDS)
            self._writer.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            if line.get("step", -1) >= first:
                self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """One line of the record."""
        if self._writer is None or not (values := list(_values(line))):
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        then = datetime.fromisoformat(line["time"]).timestamp()
        with self._refusals_noted():
            self._writer.add_event(Event(step=line["step"], wall_time=then, summary=Summary(value=values)))

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            with self._refusals_noted():
                self._writer.close()
        self._writer = None

    @contextmanager
    def _refusals_noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refusal = error.strerror or str(error)


def _values(line: dict[str, Any]) -> Iterator[Summary.Value]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    kind = line["event"]
    if kind == SampleGenerated.kind:
        yield _text("sample", f"{line['prompt']}{line['text']}")
    for tag, value in numbers(line).items():
        yield Summary.Value(tag=tag, simple_value=value)


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What of a line of the record makes curves: `event/field` and value, with `/loop` where there is one a loop."""
    found: dict[str, float] = {}
    for name, value in line.items() if line["event"] in WITH_NUMBERS else ():
        each = (
            {f"/{loop}": of_loop for loop, of_loop in enumerate(value, 1)} if isinstance(value, list) else {"": value}
        )
        found |= {f"{line['event']}/{name}{end}": number for end, number in each.items() if _is_number(number)}
    found.pop(f"{line['event']}/step", None)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(tag: str, text: str) -> Summary.Value:
    """As TensorBoard's text plugin wants it; indented, because it takes text for Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    indented = "\n".join(f"    {each}" for each in text.split("\n"))
    return Summary.Value(
        tag=f"{tag}/text_summary",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(dtype="DT_STRING", string_val=[indented.encode()], tensor_shape=shape),
    )
