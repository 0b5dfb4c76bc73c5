"""Figures for Prometheus, through Ray: every node of a cluster serves those of its processes under ``/metrics``.

Ray puts ``ray_`` before the names: ``ray_segbatch_rows_total`` and so on.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from segbatch.records import Outcome
from segbatch.telemetry import Usage

_SHARD_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class Exported:
    """What the driver of a map tells Prometheus."""

    def __init__(self) -> None:
        self._rows = Counter("segbatch_rows", "Rows that are done, by status.", ("status",))
        self._shards = Counter("segbatch_shards", "Shards that are committed.")
        self._bytes = Counter("segbatch_bytes_written", "Bytes of the files that are committed.")
        self._seconds = Counter("segbatch_stage_seconds", "Seconds of work in all threads, by stage.", ("stage",))
        self._actors = Gauge("segbatch_actors", "Actors at work.")
        self._in_flight = Gauge("segbatch_shards_in_flight", "Shards at work.")
        self._events = Counter("segbatch_events", "What happened to actors and shards, by kind.", ("event",))
        self._counted: dict[str, int] = {}

    def add(self, outcome: Outcome) -> None:
        """A shard is done."""
        if outcome.committed_by_other:
            return
        self._shards.inc()
        counts = {"ok": outcome.rows - outcome.copied - outcome.bad, **outcome.reasons}
        for status, rows in counts.items():
            if rows > 0:
                self._rows.inc(rows, {"status": status})
        if outcome.bytes_out:
            self._bytes.inc(outcome.bytes_out)
        for stage, spent in outcome.seconds.items():
            if spent > 0:
                self._seconds.inc(spent, {"stage": stage})

    def state(self, actors: int, in_flight: int, events: Mapping[str, int]) -> None:
        """How many actors and shards are at work, and what has happened so far; see ``Meter.count``."""
        self._actors.set(actors)
        self._in_flight.set(in_flight)
        for event, count in events.items():
            if (more := count - self._counted.get(event, 0)) > 0:
                self._events.inc(more, {"event": event})
        self._counted = dict(events)


class ExportedByActor:
    """What an actor tells Prometheus itself; Ray adds the node and the worker."""

    def __init__(self) -> None:
        self._seconds = Histogram("segbatch_shard_seconds", "Wall time of a shard.", boundaries=_SHARD_SECONDS)
        self._moved = Counter("segbatch_moved", "Bytes read and written, requests repeated and throttled.", ("what",))
        self._cpu = Counter("segbatch_cpu_seconds", "CPU seconds of the process.")
        self._memory = Gauge("segbatch_peak_bytes", "Greatest memory of the process.")
        self._gpu = Gauge("segbatch_gpu_utilisation", "Mean share of the time in which the GPU computed, 0 to 1.")
        self._told = Usage(0.0, 0, {})

    def ran(self, seconds: float) -> None:
        """A shard took so long."""
        self._seconds.observe(seconds)

    def used(self, so_far: Usage) -> None:
        """What the process has used by now."""
        for what, count in so_far.moved.items():
            if (more := count - self._told.moved.get(what, 0)) > 0:
                self._moved.inc(more, {"what": what})
        if (more_s := so_far.cpu_s - self._told.cpu_s) > 0:
            self._cpu.inc(more_s)
        self._memory.set(so_far.peak_bytes)
        if so_far.gpu:
            self._gpu.set(so_far.gpu["busy"])
        self._told = so_far
