"""The engine without Ray: one worker in this process, shard after shard. For tests and tiny jobs."""

import os
from collections.abc import Iterable, Iterator

from segbatch.config import EngineConfig
from segbatch.engine.base import Control
from segbatch.engine.journal import NullJournal
from segbatch.errors import SegbatchError, StoppedError
from segbatch.records import Outcome, ShardRef
from segbatch.runs import Task, Worker


class InlineEngine:
    """See ``engine.base.Engine``. A sample that kills its process kills the run: quarantine needs Ray."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def start(self) -> None:
        """Nothing to bring up."""

    def close(self) -> None:
        """Nothing to leave."""

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Iterator[Outcome]:
        """Work on the shards one after the other; the worker is opened with the first."""
        worker: Worker | None = None
        try:
            for shard in shards:
                if control.stop.is_set():
                    raise StoppedError("stopped before the end", "run the same command again to go on")
                if worker is None:
                    worker = task.open(self._config.threads or os.cpu_count() or 1, NullJournal())
                    control.on_ready()
                yield self._run(worker, shard, control)
                control.on_rows(worker.rows_done)
        finally:
            if worker is not None:
                worker.close()

    def _run(self, worker: Worker, shard: ShardRef, control: Control) -> Outcome:
        for attempt in range(1, self._config.attempts + 1):
            try:
                return worker.run(shard, control.quarantine)
            except SegbatchError as error:
                if not error.retryable or attempt == self._config.attempts:
                    raise
        raise AssertionError("unreachable")
