"""Which shard is worked on next: a queue, failed attempts, and second copies of shards that take too long.

A shard that has failed is worked on alone: of those that were in flight together, it may have been another's fault.
"""

import statistics
from collections import deque
from collections.abc import Iterable

from segbatch.engine.base import Failures
from segbatch.records import ShardRef

_ENOUGH = 3
_MEASURED = 100
_SHORTEST_S = 2.0


class Schedule:
    """Every shard until it is finished or has failed for good. Memory: what is in flight, and what came back.

    A shard may be in flight as several *copies*. The first that is finished counts; what becomes of the others does
    not matter, for a shard's result is committed once.

    Args:
        shards: taken from as they are needed.
        attempts: how often a shard may fail.
        patience: a shard that takes so many times as long as shards do, row for row, is a straggler; 0: none is.
    """

    def __init__(self, shards: Iterable[ShardRef], attempts: int, patience: float) -> None:
        self._fresh = iter(shards)
        self._waiting: deque[ShardRef] = deque()
        self._suspects: deque[ShardRef] = deque()  # waiting, too, for an actor with nothing else
        self._failures = Failures(attempts)
        self._patience = patience
        self._copies: dict[int, int] = {}
        self._finished: set[int] = set()  # of those in flight
        self._seconds_per_row: deque[float] = deque(maxlen=_MEASURED)

    def queued(self, wanted: int) -> int:
        """How many shards wait, counted up to ``wanted``: the rest of them stay in their stream."""
        failed = len(self._suspects)
        while failed + len(self._waiting) < wanted and (shard := next(self._fresh, None)) is not None:
            self._waiting.append(shard)
        return failed + len(self._waiting)

    def has_work(self) -> bool:
        """Whether a shard waits or is in flight without a finished copy."""
        return len(self._copies) > len(self._finished) or self.queued(1) > 0

    def is_open(self, number: int) -> bool:
        """Whether a shard in flight is not finished yet."""
        return number in self._copies and number not in self._finished

    def take(self, beside: Iterable[int] = ()) -> ShardRef | None:
        """The next shard, in flight from now on, for an actor with the shards ``beside``; None when none is for it."""
        others = list(beside)
        if any(self._failures.count(number) for number in others):
            return None
        if self._suspects and not others:
            return self.copy(self._suspects.popleft())
        if self.queued(len(self._suspects) + 1) > len(self._suspects):
            return self.copy(self._waiting.popleft())
        return None

    def copy(self, shard: ShardRef) -> ShardRef:
        """One more copy of it is in flight."""
        self._copies[shard.number] = self._copies.get(shard.number, 0) + 1
        return shard

    def copies(self, number: int) -> int:
        """How many copies of a shard are in flight."""
        return self._copies.get(number, 0)

    def finished(self, shard: ShardRef, seconds: float) -> bool:
        """A copy has an outcome after ``seconds``; whether it is the first."""
        first = shard.number not in self._finished
        if first:
            self._finished.add(shard.number)
            self._seconds_per_row.append(seconds / max(shard.rows, 1))
        self._end(shard)
        return first

    def failed(self, shard: ShardRef, reason: str, where: str = "") -> None:
        """A copy came to nothing: an attempt is charged and the shard waits again, unless another copy goes on."""
        if self._end(shard) and self._failures.again(shard, reason, where):
            self._suspects.append(shard)

    def put_back(self, shard: ShardRef) -> None:
        """A copy was given up for a reason that is not the shard's own: it is next, and no attempt is charged."""
        if self._end(shard):
            (self._suspects if self._failures.count(shard.number) else self._waiting).appendleft(shard)

    def straggler(self, running: Iterable[tuple[ShardRef, float]]) -> ShardRef | None:
        """The one that is latest among those in flight, each with its seconds so far; None when all are in time.

        Only new shards: a shard that is written over is guarded by the tag of what it replaces, and has one copy.
        """
        if not self._patience or len(self._seconds_per_row) < _ENOUGH:
            return None
        per_row = self._patience * statistics.median(self._seconds_per_row)
        late = [
            (seconds / limit, shard)
            for shard, seconds in running
            if seconds > (limit := max(per_row * max(shard.rows, 1), _SHORTEST_S))
            and shard.mode == "create"
            and self.is_open(shard.number)
            and self._copies[shard.number] == 1
        ]
        return max(late, key=lambda found: found[0])[1] if late else None

    def check(self) -> None:
        """Call when everything else is done.

        Raises:
            EngineError: some shards failed for good.
        """
        self._failures.check()

    def _end(self, shard: ShardRef) -> bool:
        """A copy is no longer in flight; whether the shard is lost without another one."""
        left = self._copies[shard.number] - 1
        if left:
            self._copies[shard.number] = left
            return False
        del self._copies[shard.number]
        is_lost = shard.number not in self._finished
        self._finished.discard(shard.number)
        return is_lost
