"""Tasks that do nothing useful, and do it in every way that an engine must cope with."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import doubles
import numpy as np
from doubles import note
from numpy.typing import NDArray

from segbatch.records import Outcome, ShardRef
from segbatch.runs import Journal


def shards(root: Path, count: int, rows: int = 3) -> list[ShardRef]:
    """Shards of nothing."""
    return [ShardRef(str(root), "masks", 0, i, f"part-{i:08d}-x.parquet", "", 0, rows, rows, 30) for i in range(count)]


def runs_of(log: Path) -> list[int]:
    """Numbers of the shards that were begun, in order."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("run")]


@dataclass(frozen=True)
class Sleeping:
    """Sleeps for every shard, one at a time, as a model would compute.

    Attributes:
        log: takes a line ``run NUMBER PID`` for every shard that is begun, ``done NUMBER PID TIME`` for one that is
            done, by the machine's monotonic clock.
        seconds: for a shard.
        slow: seconds of single shards.
        first_only: they are slow only when they are begun for the first time.
    """

    log: str
    seconds: float
    slow: Mapping[int, float] | None = None
    first_only: bool = True

    def open(self, threads: int, journal: Journal) -> "SleepingWorker":
        note(self.log, f"open {os.getpid()}")
        return SleepingWorker(self)


class SleepingWorker:
    def __init__(self, task: Sleeping) -> None:
        self._task = task
        self._model = threading.Lock()
        self.rows_done = 0

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        task, seconds = self._task, self._task.seconds
        note(task.log, f"run {shard.number} {os.getpid()}")
        if shard.number in (task.slow or {}):
            again = runs_of(Path(task.log)).count(shard.number) > 1 if task.log else False
            seconds = seconds if again and task.first_only else (task.slow or {})[shard.number]
        with self._model:
            time.sleep(seconds)
            self.rows_done += shard.rows
            note(task.log, f"done {shard.number} {os.getpid()} {time.monotonic()}")
        return Outcome(shard.number, shard.plan, shard.rows, 0)

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        raise AssertionError("nothing was noted in the journal")

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class Stuck:
    """The first time that ``shard`` is begun, the worker gets stuck, or dies, with a word on the standard error.

    Attributes:
        how: ``waits`` (as for a store that does not answer), ``holds`` (the interpreter, as in C code), ``dies``,
            ``raises``.
    """

    log: str
    shard: int
    how: str

    def open(self, threads: int, journal: Journal) -> "StuckWorker":
        return StuckWorker(self)


class StuckWorker:
    def __init__(self, task: Stuck) -> None:
        self._task = task
        self.rows_done = 0

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        note(self._task.log, f"run {shard.number} {os.getpid()}")
        if shard.number == self._task.shard and runs_of(Path(self._task.log)).count(shard.number) == 1:
            self.get_stuck()
        self.rows_done += shard.rows
        return Outcome(shard.number, shard.plan, shard.rows, 0)

    def get_stuck(self) -> None:
        print("the last word", file=sys.stderr, flush=True)
        if self._task.how == "dies":
            os._exit(3)
        if self._task.how == "raises":
            raise KeyError("colour")
        library = ctypes.PyDLL(None) if self._task.how == "holds" else ctypes.CDLL(None)
        library.sleep(600)

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        raise AssertionError("nothing was noted in the journal")

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class HangingModel(doubles.FreeModel):
    """Never comes back from an image whose first pixel has the colour ``marker``."""

    marker: doubles.Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if doubles.marked(batch, self.marker):
            time.sleep(600)
