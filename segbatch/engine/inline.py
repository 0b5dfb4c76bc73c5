"""The engine without Ray: one worker in this process, fed from two threads. For tests and small jobs."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from segbatch.config import EngineConfig
from segbatch.engine.base import Control, Failures, as_ours, traced, worth_repeating
from segbatch.engine.journal import NullJournal
from segbatch.errors import StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task, Worker, committed

T = TypeVar("T")

_SHARDS_AT_A_TIME = 2
_TICK_S = 0.5


class InlineEngine:
    """See ``engine.base.Engine``. A sample that kills its process kills the run: quarantine needs Ray."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def start(self) -> None:
        """Nothing to bring up."""

    def has_gpus(self) -> bool:
        """Whether this machine has one."""
        from segbatch.inference.execution import gpu_there  # torch's, slow to import

        return gpu_there()

    def on_gpu(self, ask: Callable[[], T]) -> T:
        """Asked here."""
        return ask()

    def close(self) -> None:
        """Nothing to leave."""

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Two shards at a time, so that one is read while the other is committed; outcomes in the shards' order."""
        stream = iter(shards)
        first = next(stream, None)
        if first is None:
            return
        threads = self._config.threads or os.cpu_count() or 1
        worker = task.open(threads, NullJournal())
        control.meter.opened(threads)
        failures = Failures(self._config.attempts)
        waiting: deque[Future[Outcome | None]] = deque()
        with contextlib.closing(worker), ThreadPoolExecutor(_SHARDS_AT_A_TIME, "shard") as pool:
            control.on_ready()
            stopped = False
            try:
                for shard in itertools.chain([first], stream):
                    stopped = control.stop.is_set()
                    if stopped:
                        break
                    waiting.append(pool.submit(_run, worker, shard, control, failures))
                    if len(waiting) >= _SHARDS_AT_A_TIME:
                        yield from _finished(waiting.popleft(), worker, control)
                while waiting:
                    yield from _finished(waiting.popleft(), worker, control)
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
        if stopped:
            raise StoppedError("stopped before the end", "run the same command again to go on")
        failures.check()


def _finished(future: Future[Outcome | None], worker: Worker, control: Control) -> Generator[Outcome]:
    """Wait for a shard in short steps, so that progress shows."""
    while not wait([future], _TICK_S).done:
        control.on_rows(worker.rows_done)
    outcome = future.result()
    control.on_rows(worker.rows_done)
    if outcome is not None:
        yield outcome


def _run(worker: Worker, shard: ShardRef, control: Control, failures: Failures) -> Outcome | None:
    """The outcome; None when the shard has failed for good."""
    while True:
        try:
            if (outcome := committed(shard)) is None:
                with traced(shard, control.trace) as came_to:
                    outcome = worker.run(shard, control.quarantine)
                    came_to(outcome)
            return outcome
        except Exception as error:
            ours = as_ours(error)
            if not worth_repeating(ours):
                raise
            control.meter.count("attempts failed")
            if not failures.again(shard, str(ours)):
                return None
