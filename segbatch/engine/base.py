"""What every engine is: map shards through workers and yield outcomes."""

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from segbatch import tracing
from segbatch.errors import EngineError, SegbatchError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task
from segbatch.telemetry import Meter

log = logging.getLogger(__name__)

T = TypeVar("T")


def _ignore_ready() -> None:
    """Nobody waits."""


def _ignore_rows(done: int) -> None:
    """Nobody watches."""


def _ignore_workers(places: Sequence[str]) -> None:
    """Nobody asks."""


def _ignore_quarantine(shard: ShardRef, sample_id: str, reason: str) -> None:
    """Nobody keeps it."""


@dataclass
class Control:
    """What a driver and its engine share during one map.

    Attributes:
        stop: set to drain: finish what is in flight, start nothing new.
        quarantine: sample ids that must not be touched, with the reason; the engine adds to it.
        on_quarantine: called with shard, sample id and reason when the engine finds a sample that kills its process.
        on_ready: called when a worker is open (its model loaded) and work can begin.
        on_rows: called about once a second with the rows finished in this map.
        on_workers: called with the places of the actors that are ready, whenever they are others.
        meter: takes what the engine measures.
        trace: the span that shards belong to; see ``tracing.here``.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    quarantine: dict[str, str] = field(default_factory=dict)
    on_quarantine: Callable[[ShardRef, str, str], None] = _ignore_quarantine
    on_ready: Callable[[], None] = _ignore_ready
    on_rows: Callable[[int], None] = _ignore_rows
    on_workers: Callable[[Sequence[str]], None] = _ignore_workers
    meter: Meter = field(default_factory=Meter)
    trace: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """``start`` once, then ``map`` and ``on_gpu`` any number of times, ``close`` at the end."""

    def start(self) -> None:
        """Bring up what is needed before the first map (a local Ray)."""
        ...

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Work on every shard and yield its outcome, in any order; closing the generator ends the work.

        Raises:
            StoppedError: ``control.stop`` was set and the run has drained.
            EngineError: some shards failed for good; every other one is done first.
            SegbatchError: what a worker raised, when trying again cannot help.
        """
        ...

    def has_gpus(self) -> bool:
        """Whether a worker can have a GPU, or a part of one."""
        ...

    def on_gpu(self, ask: Callable[[], T]) -> T:
        """What ``ask`` says where a worker would compute; only where ``has_gpus``.

        Raises:
            EngineError: no GPU came free, or the process died.
            SegbatchError: what ``ask`` raised.
        """
        ...

    def close(self) -> None:
        """Leave everything as it was before ``start``."""
        ...


@runtime_checkable
class UsesGpu(Protocol):
    """A task that can say whether its workers compute on a GPU."""

    @property
    def uses_gpu(self) -> bool:
        """Whether they do."""
        ...


def uses_gpu(task: Task) -> bool:
    """Whether the workers of a task compute on a GPU."""
    return isinstance(task, UsesGpu) and task.uses_gpu


@contextlib.contextmanager
def traced(shard: ShardRef, parent: Mapping[str, str]) -> "Iterator[Callable[[Outcome], None]]":
    """A span around the work on a shard, which takes its outcome."""
    numbers = {"shard": shard.number, "plan": shard.plan, "rows": shard.rows}
    with tracing.span("segbatch shard", parent, {**numbers, "table": shard.table}) as note:

        def came_to(outcome: Outcome) -> None:
            seconds = {f"seconds.{stage}": round(spent, 4) for stage, spent in outcome.seconds.items()}
            note({"bad": outcome.bad, "bytes_out": outcome.bytes_out, **seconds})

        yield came_to


class Failures:
    """Counts the failed attempts of each shard; the rules are the same for every engine."""

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._counts: dict[int, int] = {}
        self._for_good: dict[int, tuple[str, str]] = {}

    def again(self, shard: ShardRef, reason: str, where: str = "") -> bool:
        """Note a failed attempt, and where it was made; whether there may be another."""
        count = self._counts[shard.number] = self.count(shard.number) + 1
        place = f" {where}" if where else ""
        log.warning("shard %d failed%s (attempt %d of %d): %s", shard.number, place, count, self._attempts, reason)
        if count >= self._attempts:
            self._for_good[shard.number] = reason, where
        return count < self._attempts

    def count(self, number: int) -> int:
        """How many attempts at a shard have failed."""
        return self._counts.get(number, 0)

    def check(self) -> None:
        """Call when everything else is done.

        Raises:
            EngineError: some shards failed for good.
        """
        if not self._for_good:
            return
        number, (reason, where) = next(iter(self._for_good.items()))
        many = len(self._for_good) > 1
        what = f"{len(self._for_good)} shards, for example {number}," if many else f"shard {number}"
        last = f"; the last time {where}" if where else ""
        raise EngineError(
            f"{what} failed {self._attempts} times: {reason}",
            f"everything else is done; run the same command again to go on{last}",
        )


def as_ours(error: BaseException) -> SegbatchError:
    """A worker's own error, or a bug in it as an EngineError."""
    if isinstance(error, SegbatchError):
        return error
    said = str(error).strip().splitlines()
    return EngineError(f"a worker raised {type(error).__name__}: {said[0] if said else ''}", "this looks like a bug")


def worth_repeating(error: SegbatchError) -> bool:
    """Whether another attempt at the shard could help."""
    return error.retryable or isinstance(error, EngineError)
