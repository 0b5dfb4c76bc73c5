"""A run root with as many shards as one likes: real plans and logs, but no part files and no actors."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from segbatch import jobs, schemas, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.engine import Control
from segbatch.errors import StoppedError
from segbatch.jobs import Job, Limits, RunResult, Silent
from segbatch.records import Outcome, PlanItem, ShardRef
from segbatch.runs import Run, Task
from segbatch.storage import ObjectInfo

T = TypeVar("T")


class Store:
    """Which part files are there; a file's tag is its shard's number."""

    def __init__(self, run: Run, capacity: int) -> None:
        self._run = run
        self.is_there = np.zeros(capacity, bool)
        self.calls: Counter[str] = Counter()

    def list_parts(self, folder: str) -> Iterator[ObjectInfo]:
        """See ``tables.list_parts``."""
        self.calls["list"] += 1
        shards = self._run.shards()
        for batch in shards.where(self.is_there[shards.numpy("number")]).columns.to_batches(4096):
            for number, key in zip(batch.column("number").to_pylist(), batch.column("key").to_pylist(), strict=True):
                yield ObjectInfo(f"{folder}/{key}", str(number), 1000)

    def footer(self, uri: str) -> dict[str, str]:
        """See ``tables.footer``."""
        self.calls["footer"] += 1
        number = str(int(uri.rsplit("part-", 1)[1][:8]))
        return {"segbatch.shard": number, "segbatch.plan": "0", "segbatch.rows": "1", "segbatch.bad": "0"}


class Actors:
    """An engine that does nothing, at once; it is stopped after ``limit`` shards."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store, self._limit = store, limit

    def start(self) -> None:
        """Nothing to bring up."""

    def has_gpus(self) -> bool:
        """No."""
        return False

    def on_gpu(self, ask: Callable[[], T]) -> T:
        """Asked here."""
        return ask()

    def close(self) -> None:
        """Nothing to leave."""

    def map(self, task: Task, shards: Iterable[ShardRef], control: Control) -> Generator[Outcome]:
        """Every shard is done, in order."""
        control.on_ready()
        for done, shard in enumerate(shards):
            if done == self._limit:
                raise StoppedError("stopped before the end")
            self._store.calls["work"] += 1
            self._store.is_there[shard.number] = True
            seconds = {"read": 0.0123, "decode": 0.4567, "model": 1.2345, "encode": 0.3456, "total": 2.0512}
            yield Outcome(shard.number, shard.plan, shard.rows, 0, {}, 1000, seconds, etag=str(shard.number))


class Nobody:
    """A task that is never opened."""

    def open(self, threads: int, journal: Any) -> Any:
        """See ``runs.Task``."""
        raise AssertionError("no worker is needed")


def listing(count: int) -> Iterator[PlanItem]:
    """``count`` photos."""
    for i in range(count):
        yield PlanItem(
            f"shelf/{i:09d}.jpg", f"s3://photos/shelf/{i:09d}.jpg", f"{i:032x}", 400_000, group_id="", split=""
        )


class SimulatedRun:
    """One run root; ``carry_out`` is the real thing over the simulated store and actors."""

    def __init__(self, root: Path, items: int, per_shard: int = 1) -> None:
        self.limit = items
        self.run = Run(str(root), "masks")
        self.store = Store(self.run, items)
        self.job = Job(
            verb="predict",
            table="masks",
            out=str(root),
            config={"model": "none", "schema": schemas.SCHEMA_VERSION},
            listing=lambda: listing(items),
            task=Nobody(),
            info=lambda: {"name": "none", "classes": []},
        )
        self.options = RunOptions(plan=PlanConfig(shard_rows=per_shard), engine=EngineConfig(kind="inline"))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The simulated store and actors in place of the real ones."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "list_parts", self.store.list_parts)
            patch.setattr(tables, "footer", self.store.footer)
            patch.setattr(jobs, "make", lambda config: Actors(self.store, self.limit))
            yield

    def carry_out(self) -> RunResult:
        """As a verb does it.

        Raises:
            StoppedError: after ``limit`` shards.
        """
        return jobs.carry_out(self.job, Limits(), self.options, Silent())
