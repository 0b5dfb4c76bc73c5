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
from dataclasses import dataclass
from typing import Any

from segbatch import storage
from segbatch.records import Outcome
from segbatch.tables import service
from segbatch.version import __version__

_CODEC = ("decode", "model", "encode")
"""Stages that take the codec threads' time where a model runs; photos are read, and results committed, in others."""

_WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far.

    Attributes:
        cpu_s: CPU seconds.
        peak_bytes: the greatest memory.
        moved: see ``storage.traffic``.
        gpu: ``inference.gpu.GpuUse`` of its GPU, if it uses one and NVML can be asked.
    """

    cpu_s: float
    peak_bytes: int
    moved: Mapping[str, int]
    gpu: Mapping[str, Any] | None = None


class Meter:
    """Adds up what a call of a verb and its engine measure. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._usage: dict[str, Usage] = {}
        self._idle_cpu: dict[str, float] = {}
        self._threads = 0
        self._began = usage()
        self._opened: Usage | None = None
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

    @property
    def events(self) -> dict[str, int]:
        """How often each event was counted."""
        with self._lock:
            return dict(self._events)

    def opened(self, threads: int) -> None:
        """So many codec threads are there now, over all workers; the greatest number counts."""
        with self._lock:
            self._threads = max(self._threads, threads)
            self._opened = self._opened or usage()

    def was_part_of(self, whole: "Meter") -> None:
        """Its work was done by the processes and threads of a greater one, beside that of others."""
        with self._lock:
            self._threads, self._usage = whole._threads, dict(whole._usage)
            self._opened, self._idle_cpu = whole._opened, dict(whole._idle_cpu)
            self._events.update(whole._events)

    def used(self, worker: str, so_far: Usage) -> None:
        """What a worker's process has used; to be called for the first time when it is ready to work."""
        with self._lock:
            self._idle_cpu.setdefault(worker, so_far.cpu_s)
            self._usage[worker] = so_far

    def shares(self, seconds: float) -> dict[str, float]:
        """Parts of the time, the greatest first; empty where nothing was measured.

        Where a model ran: of the codec threads' time. A stage's part is its seconds in all threads over
        ``threads x seconds``; ``waiting`` is the rest: photos that were not read yet, results that were being written,
        workers that came later or had nothing left to do. Elsewhere: of the seconds of all stages together.
        """
        if not self._seconds["model"]:
            spent = {stage: s for stage, s in self._seconds.items() if stage != "total" and s}
            whole = sum(spent.values())
            return {stage: s / whole for stage, s in sorted(spent.items(), key=lambda item: -item[1])}
        busy = {stage: self._seconds[stage] for stage in _CODEC}
        capacity = max(self._threads * seconds, sum(busy.values()))
        found = {stage: spent / capacity for stage, spent in busy.items()}
        found[_WAITING] = 1 - sum(found.values())
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def line(self, seconds: float) -> str:
        """``bound by: decode 71 % (model 20 %, ...)``; empty where nothing was measured."""
        (first, *others) = [
            f"{stage} {share:.0%}".replace("%", " %") for stage, share in self.shares(seconds).items()
        ] or [""]
        behind = f" ({', '.join(others)})" if others else ""
        return f"bound by: {first}{behind}" if first else ""

    def to_json(self, seconds: float) -> dict[str, Any]:
        """What was measured in ``seconds`` of work."""
        driver = usage()
        return {
            "images": self.rows,
            "images_per_s": self.rows / seconds if seconds else None,
            "bad": self.bad,
            "reasons": dict(self._reasons),
            "copied": self.copied,
            "shards": self.shards,
            "bytes_written": self.bytes_out,
            "moved": {"driver": _since(driver.moved, self._began.moved), "workers": self._moved_by_workers()},
            "stage_seconds": {stage: round(spent, 3) for stage, spent in self._seconds.items()},
            "codec_threads": self._threads,
            "shares": {stage: round(share, 4) for stage, share in self.shares(seconds).items()},
            "cpu_utilisation": self._cpu_utilisation(driver, seconds),
            "events": dict(self._events),
            "driver": {"cpu_s": round(driver.cpu_s - self._began.cpu_s, 3), "peak_bytes": driver.peak_bytes},
            "workers": {name: _of_worker(self._usage[name]) for name in sorted(self._usage)},
        }

    def _moved_by_workers(self) -> dict[str, int]:
        moved: Counter[str] = Counter()
        for used in self._usage.values():
            moved.update(used.moved)
        return dict(moved)

    def _cpu_utilisation(self, driver: Usage, seconds: float) -> float | None:
        """CPU seconds of all processes since they were ready, for each codec thread and second."""
        if self._opened is None or not self._threads or not seconds:
            return None
        workers = sum(used.cpu_s - self._idle_cpu[name] for name, used in self._usage.items())
        return round((workers + driver.cpu_s - self._opened.cpu_s) / (self._threads * seconds), 4)


def _of_worker(used: Usage) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu_s": round(used.cpu_s, 3), "peak_bytes": used.peak_bytes}
    return {**found, "gpu": dict(used.gpu)} if used.gpu else found


def _since(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {what: count - before.get(what, 0) for what, count in now.items() if count != before.get(what, 0)}


def usage(gpu: Mapping[str, Any] | None = None) -> Usage:
    """What this process has used so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(own.ru_utime + own.ru_stime, own.ru_maxrss << 10, storage.traffic.so_far(), gpu)


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
