"""What runs on the nodes: the actor that works, the one that probes, and what is asked of a node itself."""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from segbatch import tracing
from segbatch.engine import journal
from segbatch.engine.activity import Activity
from segbatch.engine.base import traced, uses_gpu
from segbatch.engine.ray_actors.exported import ExportedByActor
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task, Worker, committed
from segbatch.telemetry import Usage, usage
from segbatch.version import __version__

if TYPE_CHECKING:
    from segbatch.inference.gpu import GpuSampler

log = logging.getLogger(__name__)

_SPARE_SLOTS = 8
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STACKS = signal.SIGUSR1
_STACKS_TAKE_S = 0.5
_TAIL_BYTES = 1 << 16
_OWN_LINES = (":job_id:", ":actor_name:", ":task_name:")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor lives.

    Attributes:
        node, address: of the machine.
        pid: of the process.
        journal: path of its journal, on that machine.
        log: path of the file that takes what the process says, likewise; empty when that is no file.
        version: of segbatch there.
    """

    node: str
    address: str
    pid: int
    journal: str
    log: str
    version: str

    def __str__(self) -> str:
        return f"on node {self.address}, process {self.pid}{f', log {self.log}' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What an actor tells of itself now and then.

    Attributes:
        rows_done: rows finished so far.
        used: what its process has used.
        idle_s: by the number of each shard in flight, seconds since it did something.
    """

    rows_done: int
    used: Usage
    idle_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Remains:
    """What a dead actor left behind: (shard, sample id) of what was in flight, and the last lines of its log."""

    in_flight: list[tuple[int, str]]
    last_lines: list[str]


class Actor:
    """The process that works. Its constructor opens nothing, so that errors of ``open`` keep their type."""

    def __init__(self) -> None:
        self._leaving = threading.Lock()
        self._telling = threading.Lock()
        self._forgotten = False

    def place(self) -> Place:
        """Where it is; the journal is not written yet, so that the driver knows of it before."""
        logging.basicConfig(format=_LOG_FORMAT)
        faulthandler.register(_STACKS, all_threads=True)  # in C: a thread that holds the interpreter is no obstacle
        self._path = journal.new_path()
        here = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return Place(here.get_node_id(), address, os.getpid(), self._path, _log_of_this_process(), __version__)

    def open(self, task: Task, threads: int, at_once: int, trace: Mapping[str, str]) -> Usage:
        """Open the journal and the worker (load the model), unless the actor is no longer needed; what that used.

        ``at_once`` shards will be worked on.
        """
        with self._leaving:
            if self._forgotten:
                return usage()
            notes = journal.FileJournal(self._path, 2 * threads + at_once + _SPARE_SLOTS)
        self._activity = Activity(notes)
        try:
            with tracing.span("segbatch worker start", trace):
                self._worker = task.open(threads, self._activity)
        except BaseException:
            log.exception("the worker could not be opened")
            self.forget()
            raise
        self._gpu = _sampler() if uses_gpu(task) else None
        self._exported = ExportedByActor()
        self._trace = trace
        return self._used()

    def run(self, shard: ShardRef, skip: dict[str, str]) -> tuple[Outcome, bool, Usage]:
        """The outcome of a shard, whether it was worked on (it may be finished already), and what is used by now.

        Called from up to ``in_flight`` threads.
        """
        began = time.monotonic()
        with self._activity.of(shard.number):
            try:
                if (outcome := committed(shard)) is not None:
                    return outcome, False, self._used()
                with traced(shard, self._trace) as came_to:
                    outcome = self._worker.run(shard, skip)
                    came_to(outcome)
                self._exported.ran(time.monotonic() - began)
                return outcome, True, self._used()
            except Exception:
                log.exception("shard %d failed", shard.number)
                raise

    def figures(self) -> Figures:
        """How it gets on."""
        return Figures(self._worker.rows_done, self._used(), self._activity.idle_s())

    def _used(self) -> Usage:
        seen = self._gpu.use() if self._gpu else None
        used = usage(asdict(seen) if seen else None)
        with self._telling:
            self._exported.used(used)
        return used

    def forget(self) -> None:
        """Remove the journal: the actor is about to end, and its death will be no riddle."""
        with self._leaving:
            self._forgotten = True
            journal.remove(self._path)
        tracing.flush()


class Prober:
    """A process for samples that may kill it or never end."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def open(self, task: Task, threads: int) -> None:
        """Open a worker."""
        self._worker = task.open(threads, journal.NullJournal())

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Do everything with a sample but write it."""
        assert self._worker is not None, "opened first"
        self._worker.probe(shard, sample_id)


@ray.remote(num_cpus=0, max_retries=0)
def remains_of(place: Place, lines: int) -> Remains:
    """What a dead actor left; its journal is removed."""
    return Remains(journal.read(place.journal), last_lines(place.log, lines))


@ray.remote(num_cpus=0, max_retries=0)
def write_stacks(place: Place) -> None:
    """Have an actor's process write the stacks of all its threads into its log, whatever they are doing."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(place.pid, _STACKS)
        time.sleep(_STACKS_TAKE_S)


@ray.remote(num_cpus=0, max_retries=0)
def version() -> str:
    """segbatch's, on this node."""
    return __version__


@ray.remote(num_cpus=1, max_retries=0, max_calls=1)
def said(ask: Callable[[], object]) -> object:
    """What ``ask`` says here, in a process that ends with it."""
    return ask()


def last_lines(path: str, count: int) -> list[str]:
    """The last lines of a log, without those that are Ray's own marks."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip() and not line.startswith(_OWN_LINES)][-count:]


def _sampler() -> "GpuSampler":
    from segbatch.inference.gpu import GpuSampler

    return GpuSampler()


def _log_of_this_process() -> str:
    """The file that Ray has put in the place of the standard error; empty where there is none."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""
