"""The engine without Ray: one worker in this process, shard after shard. For tests and tiny jobs."""

import os
from collections.abc import Generator, Iterable

from segbatch.config import EngineConfig
from segbatch.engine.base import Control, Failures, as_ours, worth_repeating
from segbatch.engine.journal import NullJournal
from segbatch.errors import StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task, Worker, committed


class InlineEngine:
    """See ``engine.base.Engine``. A sample that kills its process kills the run: quarantine needs Ray."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def start(self) -> None:
        """Nothing to bring up."""

    def close(self) -> None:
        """Nothing to leave."""

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Work on the shards one after the other; the worker is opened with the first."""
        worker: Worker | None = None
        failures = Failures(self._config.attempts)
        try:
            for shard in shards:
                if control.stop.is_set():
                    raise StoppedError("stopped before the end", "run the same command again to go on")
                if worker is None:
                    worker = task.open(self._config.threads or os.cpu_count() or 1, NullJournal())
                    control.on_ready()
                outcome = _run(worker, shard, control, failures)
                if outcome is not None:
                    yield outcome
                control.on_rows(worker.rows_done)
        finally:
            if worker is not None:
                worker.close()
        failures.check()


def _run(worker: Worker, shard: ShardRef, control: Control, failures: Failures) -> Outcome | None:
    """The outcome; None when the shard has failed for good."""
    while True:
        try:
            return committed(shard) or worker.run(shard, control.quarantine)
        except Exception as error:
            ours = as_ours(error)
            if not worth_repeating(ours):
                raise
            if not failures.again(shard, str(ours)):
                return None
