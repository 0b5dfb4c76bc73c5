"""Models that stand in for real ones: cheap, countable, and able to fail in every way that matters.

All share one reference and one digest, so that a run begun with one double may go on with another. Labels are
0..3: 1 where red is above 127, plus 2 where blue is.
"""

import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import photos
from numpy.typing import NDArray

from segbatch import api, jobs, storage, tables
from segbatch.config import PlanConfig, RunOptions
from segbatch.errors import ConfigError, DataError, TransientStorageError
from segbatch.jobs import RunResult
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.planning import published
from segbatch.records import ClassInfo, ClassTable, Outcome, ShardRef
from segbatch.runs import Journal, Run

Color = tuple[int, int, int]
RED, BLUE = 1, 2
ONE_AT_A_TIME = threading.Lock()
"""For doubles that act once: ``forward`` runs in several threads at a time."""

SPEC = ModelSpec(
    name="double",
    task="semantic",
    classes=ClassTable(tuple(ClassInfo(i, n) for i, n in enumerate(("dark", "red", "blue", "both")))),
    input=InputSpec(layout="nhwc", dtype="uint8"),
    output="labels",
    digest="d0b1e",
)


@dataclass(frozen=True)
class FreeModel:
    """Costs nothing. ``log``: a file to which every load and every call of the model is appended."""

    log: str = ""

    @property
    def reference(self) -> str:
        return "double"

    def describe(self) -> ModelSpec:
        return SPEC

    def load(self, threads: int) -> "DoubleSegmenter":
        note(self.log, f"load {os.getpid()}")
        return DoubleSegmenter(self)

    def act(self, batch: NDArray[np.uint8]) -> None:
        """What goes wrong."""


class DoubleSegmenter:
    """A loaded double."""

    spec = SPEC

    def __init__(self, double: FreeModel) -> None:
        self._double = double

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        note(self._double.log, f"forward {os.getpid()} {len(batch)}")
        self._double.act(batch)
        bright = batch > 127
        labels: NDArray[np.uint16] = (RED * bright[..., 0] + BLUE * bright[..., 2]).astype(np.uint16)
        return labels


@dataclass(frozen=True)
class SlowModel(FreeModel):
    """Takes its time for every image."""

    seconds: float = 0.1

    def act(self, batch: NDArray[np.uint8]) -> None:
        time.sleep(self.seconds * len(batch))


@dataclass(frozen=True)
class KillerModel(FreeModel):
    """Ends its process, without a word, at an image whose first pixel has the colour ``marker``."""

    marker: Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FailingModel(FreeModel):
    """Raises at an image whose first pixel has the colour ``marker``."""

    marker: Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker):
            raise RuntimeError("the network does not like this image")


@dataclass(frozen=True)
class FullDisk(FreeModel):
    """From its load on, the process that holds it can write no file of more than ``limit`` bytes."""

    limit: int = 2000

    def load(self, threads: int) -> DoubleSegmenter:
        limit_files(self.limit)
        return DoubleSegmenter(self)


@dataclass(frozen=True)
class EchoTask:
    """Notes what it does in a log; ``trouble`` says in which shards what goes wrong."""

    log: str
    trouble: Mapping[int, str]
    seconds: float = 0.0

    def open(self, threads: int, journal: Journal) -> "EchoWorker":
        assert threads >= 1
        note(self.log, f"open {os.getpid()}")
        if -1 in self.trouble:
            raise ConfigError("there is no such model", "use another")
        return EchoWorker(self)


class EchoWorker:
    def __init__(self, task: EchoTask) -> None:
        self._task = task
        self._done = 0

    @property
    def rows_done(self) -> int:
        return self._done

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        note(self._task.log, f"run {shard.number}")
        time.sleep(self._task.seconds)
        trouble = self._task.trouble.get(shard.number, "")
        times = Path(self._task.log).read_text().splitlines().count(f"run {shard.number}")
        if trouble == "transient" or (trouble == "transient once" and times == 1):
            raise TransientStorageError("the store is down", "wait")
        if trouble == "fatal":
            raise DataError("the file is cut", "copy it", "truncated", "/a.jpg")
        if trouble == "bug":
            raise KeyError("colour")
        self._done += shard.rows
        return Outcome(shard.number, shard.plan, shard.rows, len(skip), {"quarantined": len(skip)})

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        raise AssertionError("nothing died")

    def close(self) -> None:
        note(self._task.log, "close")


class Stop(BaseException):
    """Ends a run in this process at once, as a power cut would."""


@dataclass(frozen=True)
class StopLater(FreeModel):
    """Raises ``Stop`` at an image whose first pixel has the colour ``marker``, as soon as ``out`` has a part.

    So the marked image must not be of the first shard. For runs in this process.
    """

    out: str = ""
    marker: Color = (255, 0, 255)

    def act(self, batch: NDArray[np.uint8]) -> None:
        if marked(batch, self.marker):
            deadline = time.monotonic() + 60
            while not tables.parts(storage.join(self.out, "masks")):
                assert time.monotonic() < deadline, "no part was written"
                time.sleep(0.01)
            raise Stop


@dataclass(frozen=True)
class Planner(FreeModel):
    """While it works for the first time, another driver plans four more photos, and dies."""

    source: str = ""
    out: str = ""

    def act(self, batch: NDArray[np.uint8]) -> None:
        with ONE_AT_A_TIME:
            if len(published(self.out)) > 1:
                return
            photos.folder(Path(self.source), 4, first=50)
            job = jobs.predict_job(self, self.source, self.out, "", jobs.Selection(), 0, api.MAX_PIXELS)
            Run(self.out, "masks").plan(job.listing, PlanConfig())


@dataclass(frozen=True)
class BrokenModel(FreeModel):
    """Kills the process that loads it."""

    def load(self, threads: int) -> DoubleSegmenter:
        note(self.log, f"load {os.getpid()}")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def predict(
    model: FreeModel,
    source: Path,
    out: Path,
    kind: str = "ray",
    shard_rows: int = 8,
    batch_size: int = 2,
    **engine: Any,
) -> RunResult:
    """``api.predict`` with any fraction of bad rows accepted; ``engine`` sets what ``EngineConfig`` has."""
    options = RunOptions.model_validate({"plan": {"shard_rows": shard_rows}, "engine": {"kind": kind, **engine}})
    return api.predict(model, str(source), str(out), batch_size=batch_size, limits=api.Limits(1.0), options=options)


def limit_files(limit: int = -1) -> None:
    """Bound the size of the files that this process may write; -1 lifts the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def marked(batch: NDArray[np.uint8], marker: Color) -> bool:
    """Whether the first pixel of any image is about of the colour ``marker``; (n, h, w, 3)."""
    return bool((np.abs(batch[:, 0, 0].astype(int) - marker).max(1) < 30).any())


def note(log: str, line: str) -> None:
    """Append a line; safe over processes."""
    if log:
        with open(log, "a") as file:
            file.write(line + "\n")


def loads(log: Path) -> list[int]:
    """Process ids of the loads so far."""
    return [int(line.split()[1]) for line in _lines(log) if line.startswith("load")]


def images_seen(log: Path) -> int:
    """Images that went through the model so far, those of calls that failed included."""
    return sum(int(line.split()[2]) for line in _lines(log) if line.startswith("forward"))


def by_process(log: Path) -> Counter[int]:
    """Images by process id."""
    counts: Counter[int] = Counter()
    for line in _lines(log):
        if line.startswith("forward"):
            counts[int(line.split()[1])] += int(line.split()[2])
    return counts


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []
