"""TensorBoard's files, written synchronously with the tensorboard package alone.

`tensorboard.summary.Writer` would do the same through a thread and a queue, but it imports TensorFlow where
that happens to be installed (seconds), repeats each tag's metadata in every event, and offers no way to write
the hparams records into the same file; TensorBoard reads several files in one run badly.

tensorboard is imported in the functions: 0.3 s that only a process which writes events should pay.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from jaxablate import disk
from jaxablate.config import flatten
from jaxablate.runstore import State

HParam = str | int | float | bool

_FLUSH_S = 5.0
_CONFIG_SUFFIX = ".hparams_config"
_file_number = itertools.count()


def proto(name: str) -> Any:
    """A module of protocol buffers; it makes its classes when imported, so a type checker sees none."""
    return importlib.import_module(f"tensorboard.{name}")


class EventFile:
    """Events on their way to `stream`, which may be a file or memory; `start` makes the usual one."""

    def __init__(self, stream: BinaryIO, started: float):
        from tensorboard.summary.writer.record_writer import RecordWriter

        event_pb2, tensor_shape_pb2 = proto("compat.proto.event_pb2"), proto("compat.proto.tensor_shape_pb2")
        self._records = RecordWriter(stream)
        self._event = event_pb2.Event
        self._scalar_class = proto("compat.proto.summary_pb2").DATA_CLASS_SCALAR
        self._float = proto("compat.proto.types_pb2").DT_FLOAT
        self._no_axes = tensor_shape_pb2.TensorShapeProto()
        self._known_tags: set[str] = set()
        self._flushed = time.monotonic()
        self._write(event_pb2.Event(wall_time=started, file_version="brain.Event:2"))
        # To a TensorBoard that is open during a resume this says: forget the steps you have, they come again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=started, step=0, session_log=start))

    @classmethod
    def start(cls, directory: Path, started: float, suffix: str = "") -> EventFile:
        """A new event file in `directory`; those that were there before are taken out of view."""
        path = directory / next_file_name(directory, suffix)
        return cls(open(path, "xb"), started)

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float | None], wall_time: float) -> None:
        """One event with all values of a step; null is shown as NaN, which TensorBoard marks as such."""
        event = self._event(wall_time=wall_time, step=step)
        for tag, value in values.items():
            entry = event.summary.value.add(tag=tag)
            # What make_tensor_proto would give, which takes most of the time of a long file.
            entry.tensor.dtype = self._float
            entry.tensor.tensor_shape.CopyFrom(self._no_axes)
            entry.tensor.float_val.append(math.nan if value is None else value)
            if tag not in self._known_tags:  # TensorBoard keeps the metadata of a tag's first event
                self._known_tags.add(tag)
                entry.metadata.plugin_data.plugin_name = "scalars"
                entry.metadata.data_class = self._scalar_class
        self._write(event)

    def summary(self, summary: Any, wall_time: float) -> None:
        """A summary that a plugin's own functions made, such as those below, at step 0."""
        self._write(self._event(wall_time=wall_time, step=0, summary=summary))

    def flush(self) -> None:
        """Hand everything to the stream's owner."""
        self._records.flush()
        self._flushed = time.monotonic()

    def flush_if_due(self) -> None:
        """Flush every few seconds, for whoever is looking."""
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def close(self) -> None:
        """Close the stream."""
        self._records.close()


def next_file_name(directory: Path, suffix: str = "") -> str:
    """Take the event files in `directory` out of view; returns the name of the one that replaces them.

    All are removed but the newest, which is emptied: a TensorBoard that is open has it open, and its Python
    loader moves on to a newer file, never from one that is gone. It takes files in the order of their names,
    so the next stamp must be greater than the last, also when the clock of this host is behind.
    """
    old = sorted(directory.glob(f"events.out.tfevents.*{suffix}"))
    for path in old[:-1]:
        path.unlink(missing_ok=True)
    stamp = int(time.time())
    if old:
        disk.write_bytes(old[-1], b"")
        last = old[-1].name.split(".")[3]
        stamp = max(stamp, int(last) + 1 if last.isdigit() else 0)
    where = f"{socket.gethostname()}.{os.getpid()}.{next(_file_number)}"
    return f"events.out.tfevents.{stamp:010d}.{where}{suffix}"


# ---------------------------------------------------------------------------------------------- hparams


def run_hparams(config: Mapping[str, Any]) -> dict[str, HParam]:
    """What the hparams page shows of a run: its arm and all that it computes from, but the seed."""
    left_out = ("study", "scale", "host", "task", "seed")
    flat = flatten({k: v for k, v in config.items() if k not in left_out})
    return {k: str(v) if isinstance(v, list) else v for k, v in flat.items()}


def session_group(
    arm: str, learning_rate: float | None, phase: Literal["tuning", "confirm"] = "confirm"
) -> str:
    """The row of the hparams page that the seeds of an arm at a learning rate share; tuning seeds are apart."""
    name = arm if learning_rate is None else f"{arm} lr={learning_rate:g}"
    return f"{name} (tuning)" if phase == "tuning" else name


def session_start(hparams: Mapping[str, HParam], group: str | None, started: float) -> Any:
    """The summary that opens a run's session on the hparams page."""
    from tensorboard.plugins.hparams import summary_v2

    # The page treats a number that is not finite as absent; as text it is at least shown.
    shown = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in hparams.items()
    }
    return summary_v2.hparams_pb(shown, trial_id=group, start_time_secs=started)


def session_end(state: State, ended: float) -> Any:
    """The summary that closes it. `hparams_pb` has no counterpart for this, so it is put together here."""
    from tensorboard.plugins.hparams import metadata

    summary_pb2 = proto("compat.proto.summary_pb2")
    api_pb2, plugin_data_pb2 = (proto(f"plugins.hparams.{name}_pb2") for name in ("api", "plugin_data"))
    status = api_pb2.STATUS_SUCCESS if state == "done" else api_pb2.STATUS_FAILURE
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended)
    value = summary_pb2.Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info)),
        tensor=metadata.NULL_TENSOR,
    )
    return summary_pb2.Summary(value=[value])


def experiment_hparams(
    logdir: str | os.PathLike[str], hparams: Mapping[str, Sequence[HParam]], metrics: Sequence[str]
) -> None:
    """Tell TensorBoard, in the root logdir, every hyperparameter (with its values) and metric of a study.

    Without it the page takes the keys from the runs that happen to be there, and keys vanish (tensorboard
    issue #5596). Writing it again replaces what was there. `metrics` are scalar tags, such as `val/loss`, or
    `best/val_loss` as written by `MetricsLog.finish`.

    Below one logdir there must be one such record: of several, TensorBoard takes whichever it meets first, and
    its data server meets runs in another order in every process.
    """
    from tensorboard.plugins.hparams import summary_v2

    def domain(name: str, values: Sequence[HParam]) -> summary_v2.Discrete:
        if not values:
            raise ValueError(f"hparams[{name!r}]: no values")
        if all(isinstance(value, bool) for value in values):
            return summary_v2.Discrete(sorted(set(values)), dtype=bool)
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return summary_v2.Discrete(sorted({float(value) for value in values}), dtype=float)
        return summary_v2.Discrete(sorted({str(value) for value in values}), dtype=str)

    logdir = Path(logdir)
    disk.make_private(logdir)
    started = time.time()
    config = summary_v2.hparams_config_pb(
        hparams=[summary_v2.HParam(name, domain(name, values)) for name, values in hparams.items()],
        metrics=[summary_v2.Metric(tag) for tag in metrics],
        time_created_secs=started,
    )
    events = EventFile.start(logdir, started, _CONFIG_SUFFIX)
    events.summary(config, started)
    events.close()


def declare_experiment(
    study: Path, configs: Iterable[Mapping[str, Any]], response: str, others: Iterable[str] = ()
) -> None:
    """Tells the hparams page of a study directory which columns to show: what differs between `configs`.

    Written before the runs start, and again whenever runs are added; keys that it does not name would be
    missing from the page. `response` and `others` are metrics.
    """
    values: dict[str, list[HParam]] = {}
    for config in configs:
        for key, value in run_hparams(config).items():
            values.setdefault(key, []).append(value)
    varied = {k: v for k, v in values.items() if len(set(v)) > 1 or k in ("arm", "optim.learning_rate")}
    best = f"best/{response.replace('/', '_')}"
    experiment_hparams(
        study, varied, list(dict.fromkeys([best, response, *others, "val/loss", "train/loss"]))
    )


# ------------------------------------------------------------------------------------------ other plugins


def text(tag: str, markdown: str) -> Any:
    """A summary for the text dashboard."""
    from tensorboard.plugins.text import metadata

    return _string(tag, markdown.encode(), metadata.create_summary_metadata("", ""))


def custom_scalars(layout: Any) -> Any:
    """A summary that gives the custom scalars dashboard its `layout` (a `layout_pb2.Layout`)."""
    from tensorboard.plugins.custom_scalar import metadata

    return _string(
        metadata.CONFIG_SUMMARY_TAG, layout.SerializeToString(), metadata.create_summary_metadata()
    )


def _string(tag: str, content: bytes, metadata: Any) -> Any:
    from tensorboard.util import tensor_util

    summary_pb2 = proto("compat.proto.summary_pb2")
    metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
    value = summary_pb2.Summary.Value(
        tag=tag, metadata=metadata, tensor=tensor_util.make_tensor_proto(content)
    )
    return summary_pb2.Summary(value=[value])
