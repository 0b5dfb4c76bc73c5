"""What a call of a verb measured: a record in the run root, and where the time went in one line.

``.segbatch/runs/<UTC time>-<uuid>.json`` is written once per call that worked on shards, also when it failed or was
stopped, and never changed.
"""

import datetime
import json
import os
import platform
import resource
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from segbatch import storage
from segbatch.records import Outcome
from segbatch.tables import service
from segbatch.version import __version__

_CODEC = ("decode", "model", "encode")
"""Stages that take the codec threads' time; photos are read, and results committed, in other threads."""

_WAITING = "waiting"


class Meter:
    """Adds up what a call of a verb and its engine measure. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._usage: dict[str, tuple[float, int]] = {}
        self._threads = 0
        self._began = usage()[0]
        self.rows = self.bad = self.copied = self.shards = self.bytes_out = 0

    def add(self, outcome: Outcome) -> None:
        """A shard is finished; one that somebody else has committed is none of this call's work."""
        if outcome.committed_by_other:
            return
        with self._lock:
            self.shards += 1
            self.rows += outcome.rows - outcome.copied
            self.copied += outcome.copied
            self.bad += outcome.bad
            self.bytes_out += outcome.bytes_out
            self._seconds.update(outcome.seconds)
            self._reasons.update(outcome.reasons)

    def count(self, event: str) -> None:
        """Something happened that a person wants to know the number of: an actor's death, a failed attempt."""
        with self._lock:
            self._events[event] += 1

    def opened(self, threads: int) -> None:
        """So many codec threads are there now, over all workers; the greatest number counts."""
        with self._lock:
            self._threads = max(self._threads, threads)

    def used(self, worker: str, cpu_s: float, peak_bytes: int) -> None:
        """CPU seconds and the greatest memory of a worker's process so far."""
        with self._lock:
            self._usage[worker] = cpu_s, peak_bytes

    def shares(self, seconds: float) -> dict[str, float]:
        """Parts of the codec threads' time, the greatest first; empty where no model ran.

        A stage's part is its seconds in all threads over ``threads x seconds``; ``waiting`` is the rest: photos that
        were not read yet, results that were being written, workers that came later or had nothing left to do.
        """
        busy = {stage: self._seconds[stage] for stage in _CODEC}
        if not busy["model"]:
            return {}
        capacity = max(self._threads * seconds, sum(busy.values()))
        found = {stage: spent / capacity for stage, spent in busy.items()}
        found[_WAITING] = 1 - sum(found.values())
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def line(self, seconds: float) -> str:
        """``bound by: decode 71 % (model 20 %, ...)``; empty where no model ran."""
        (first, *others) = [
            f"{stage} {share:.0%}".replace("%", " %") for stage, share in self.shares(seconds).items()
        ] or [""]
        return f"bound by: {first} ({', '.join(others)})" if first else ""

    def to_json(self, seconds: float) -> dict[str, Any]:
        """What was measured in ``seconds`` of work."""
        cpu = {name: round(used, 3) for name, (used, _) in self._usage.items()}
        peak = {name: most for name, (_, most) in self._usage.items()}
        cpu_s, peak_bytes = usage()
        return {
            "images": self.rows,
            "images_per_s": self.rows / seconds if seconds else None,
            "bad": self.bad,
            "reasons": dict(self._reasons),
            "copied": self.copied,
            "shards": self.shards,
            "bytes_written": self.bytes_out,
            "stage_seconds": {stage: round(spent, 3) for stage, spent in self._seconds.items()},
            "codec_threads": self._threads,
            "shares": {stage: round(share, 4) for stage, share in self.shares(seconds).items()},
            "events": dict(self._events),
            "driver": {"cpu_s": round(cpu_s - self._began, 3), "peak_bytes": peak_bytes},
            "workers": {name: {"cpu_s": cpu[name], "peak_bytes": peak[name]} for name in sorted(cpu)},
        }


def usage() -> tuple[float, int]:
    """CPU seconds and the greatest memory in bytes of this process so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime, own.ru_maxrss << 10


def write(root: str, record: Mapping[str, Any]) -> str:
    """Put a record of a call into a run root; gives its URI."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    uri = service(root, "runs", f"{when}-{uuid.uuid4().hex}.json")
    storage.create(uri, json.dumps(record, indent=1).encode())
    return uri


def surroundings() -> dict[str, Any]:
    """What the figures of a record depend on beside the input."""
    found = {"segbatch": __version__, "python": platform.python_version(), "machine": platform.node()}
    modules = {name: sys.modules.get(name) for name in ("ray", "torch", "openvino")}
    found |= {name: str(module.__version__) for name, module in modules.items() if module is not None}
    return {**found, "processor": _processor(), "cpus": os.cpu_count()}


def _processor() -> str:
    """Its name, as Linux tells it; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""
