"""What every engine is: map shards through workers and yield outcomes."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task


def _ignore_ready() -> None:
    """Nobody waits."""


def _ignore_rows(done: int) -> None:
    """Nobody watches."""


def _ignore_quarantine(sample_id: str, reason: str) -> None:
    """Nobody keeps it."""


@dataclass
class Control:
    """What a driver and its engine share during one map.

    Attributes:
        stop: set to drain: finish what is in flight, start nothing new.
        quarantine: sample ids that must not be touched, with the reason; the engine adds to it.
        on_quarantine: called when the engine finds a sample that kills its process.
        on_ready: called when a worker is open (its model loaded) and work can begin.
        on_rows: called about once a second with the rows finished in this map.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    quarantine: dict[str, str] = field(default_factory=dict)
    on_quarantine: Callable[[str, str], None] = _ignore_quarantine
    on_ready: Callable[[], None] = _ignore_ready
    on_rows: Callable[[int], None] = _ignore_rows


class Engine(Protocol):
    """``start`` once, ``map`` any number of times, ``close`` at the end."""

    def start(self) -> None:
        """Bring up what is needed before the first map (a local Ray)."""
        ...

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Iterator[Outcome]:
        """Work on every shard and yield its outcome, in any order.

        Raises:
            StoppedError: ``control.stop`` was set and the run has drained.
            EngineError: some shards failed for good; every other one is done first.
            SegbatchError: what a worker raised, when trying again cannot help.
        """
        ...

    def close(self) -> None:
        """Leave everything as it was before ``start``."""
        ...
