"""Figures for Prometheus, through Ray: every node of a cluster serves those of its processes under ``/metrics``.

Ray puts ``ray_`` before the names: ``ray_segbatch_rows_total`` and so on.
"""

from ray.util.metrics import Counter, Gauge

from segbatch.records import Outcome


class Exported:
    """What the driver of a map tells Prometheus."""

    def __init__(self) -> None:
        self._rows = Counter("segbatch_rows", "Rows that are done, by status.", ("status",))
        self._shards = Counter("segbatch_shards", "Shards that are committed.")
        self._bytes = Counter("segbatch_bytes_written", "Bytes of the files that are committed.")
        self._seconds = Counter("segbatch_stage_seconds", "Seconds of work in all threads, by stage.", ("stage",))
        self._actors = Gauge("segbatch_actors", "Actors at work.")
        self._in_flight = Gauge("segbatch_shards_in_flight", "Shards at work.")

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

    def state(self, actors: int, in_flight: int) -> None:
        """How many actors and shards are at work."""
        self._actors.set(actors)
        self._in_flight.set(in_flight)
