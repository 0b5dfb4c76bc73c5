"""How long a call may take, when it is repeated, and when a store is left alone for a while.

- Every request has a time limit: to connect, between two bytes, and as a whole.
- A failure that may pass is repeated after a random pause (full jitter) that doubles, at most ``ATTEMPTS`` times;
  where the store asks for fewer requests, until ``total_s`` is over.
- When ``_TRIP_AFTER`` requests to a store have failed in a row, in all threads together, its circuit breaker opens:
  requests wait without asking, and a single one probes. A store that has been away for ``_OUTAGE_S`` is given up:
  calls fail at once, with one message, until a probe gets through; while one is out they wait ``_PROBE_WAIT_S``.

Limits in seconds come from the environment: ``SEGBATCH_STORAGE_CONNECT_S``, ``SEGBATCH_STORAGE_READ_S``,
``SEGBATCH_STORAGE_TOTAL_S``; ``SEGBATCH_STORAGE_CONNECTIONS`` is how many requests to a kind of store run at a time.
"""

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TypeVar

from segbatch.errors import ConfigError, SegbatchError, TransientStorageError
from segbatch.storage import failures, traffic

T = TypeVar("T")

ATTEMPTS = 5
"""How often a transient failure is tried before it is an error."""

_BACK_OFF_S = 0.4
_LONGEST_PAUSE_S = 20.0
_SLOWEST = 1_000_000  # bytes per second; slower than that for a whole request is as good as dead
_TRIP_AFTER = 10
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 15.0
_OUTAGE_S = 30.0
_PROBE_WAIT_S = 5.0
_POLL_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long to wait for a store, in seconds, and how many requests run at a time."""

    connect_s: float = 10.0
    read_s: float = 60.0
    total_s: float = 120.0
    connections: int = 64

    @classmethod
    def from_environment(cls) -> "Limits":
        """The defaults, changed by ``SEGBATCH_STORAGE_*``.

        Raises:
            ConfigError: a value is not a positive number.
        """
        found = {f.name: os.environ.get(f"SEGBATCH_STORAGE_{f.name.upper()}", "") for f in fields(cls)}
        values = {name: _positive(name, text) for name, text in found.items() if text}
        connections = int(values.pop("connections", cls.connections))
        return cls(connections=connections, **values)

    def request_s(self, size: int) -> float:
        """Limit of one request that moves ``size`` bytes."""
        return self.connect_s + self.read_s + size / _SLOWEST

    def call_s(self, size: int) -> float:
        """Limit of a call that moves ``size`` bytes, with all its repetitions."""
        return self.total_s + 2 * size / _SLOWEST


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6 or (name == "connections" and value != int(value)):
        raise ConfigError(f"SEGBATCH_STORAGE_{name.upper()}={text} is no positive number", "for example 30")
    return value


@dataclass
class Breaker:
    """Whether a store answers, over all requests of this process.

    Attributes:
        store: its name, ``s3://bucket``.
        probe_s: how long the one request that probes may take before another one does.
    """

    store: str
    probe_s: float = 70.0
    _failures: int = 0
    _rest_s: float = 0.0
    _since: float = 0.0
    _until: float | None = None
    _probed: float = -math.inf
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def rests(self) -> bool:
        """Whether it does not answer, as far as is known."""
        return self._until is not None

    def admit(self) -> str:
        """``yes``, ``probe`` (the store is resting, this one request looks), ``wait``, or ``no`` (given up)."""
        with self._lock:
            now = time.monotonic()
            if self._until is None:
                return "yes"
            if now < self._until:
                is_probed = now - self._probed < _PROBE_WAIT_S
                return "no" if now - self._since > _OUTAGE_S and not is_probed else "wait"
            self._until, self._probed = now + self.probe_s, now
            return "probe"

    def answered(self) -> None:
        """The store has said something, if only no."""
        with self._lock:
            if self._until is not None:
                log.warning("%s answers again", self.store)
            self._failures, self._rest_s, self._until, self._probed = 0, 0.0, None, -math.inf

    def failed(self, was_probe: bool, why: str) -> None:
        """A request got no proper answer."""
        with self._lock:
            self._failures += 1
            now = time.monotonic()
            if self._until is None and self._failures >= _TRIP_AFTER:
                self._since = now
                log.warning("%s does not answer (%s): requests to it wait", self.store, why)
            elif self._until is None or not was_probe:
                return
            self._rest_s = min(max(_FIRST_REST_S, 2 * self._rest_s), _LONGEST_REST_S)
            self._until, self._probed = now + self._rest_s, -math.inf


class Tries:
    """The attempts at one call: when the next one may begin, and when to give up."""

    def __init__(self, uri: str, doing: str, breaker: Breaker | None = None, total_s: float = Limits.total_s) -> None:
        self._uri, self._doing, self._breaker = uri, doing, breaker
        self._ends = time.monotonic() + total_s
        self._count = self._pauses = 0
        self._admitted = "yes"
        self._looked_again = False

    def left_s(self) -> float:
        """Seconds until the call is given up."""
        return max(self._ends - time.monotonic(), 0.001)

    def stood_in_line(self, seconds: float) -> None:
        """Behind other requests of this process, which is not the store's fault."""
        self._ends += seconds

    @property
    def is_overtaken(self) -> bool:
        """Whether the store has gone to rest since this request was admitted; it must ask again."""
        return self._admitted == "yes" and self._breaker is not None and self._breaker.rests

    def hold_s(self) -> float:
        """Seconds to wait before asking whether the request may go; 0: it may.

        Raises:
            TransientStorageError: the store has been away for too long.
        """
        self._admitted = self._breaker.admit() if self._breaker else "yes"
        if self._admitted == "no" or (self._admitted == "wait" and time.monotonic() >= self._ends):
            assert self._breaker
            raise TransientStorageError(
                f"cannot {self._doing} {self._uri}: {self._breaker.store} has not answered for a while",
                "run the same command again when it does",
            )
        return random.uniform(0.5, 1.5) * _POLL_S if self._admitted == "wait" else 0.0

    def answered(self) -> None:
        """The request is done."""
        if self._breaker:
            self._breaker.answered()

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next request.

        Raises:
            SegbatchError: ``error`` as one of ours, when there is no use in another request.
        """
        ours = failures.translate(error, self._uri, self._doing)
        throttled = failures.is_throttled(error)
        if self._breaker:
            if throttled or not ours.retryable or failures.is_expired(error):
                self._breaker.answered()
            else:
                self._breaker.failed(self._admitted == "probe", type(error).__name__)
        if not ours.retryable and failures.may_be_expired(error) and not self._looked_again:
            self._looked_again = True  # with new keys, if there are any
            return 0.0
        self._count += not throttled
        pause = random.uniform(0, min(_BACK_OFF_S * 2**self._pauses, _LONGEST_PAUSE_S))
        self._pauses += 1
        if not ours.retryable or self._count >= ATTEMPTS or time.monotonic() + pause >= self._ends:
            raise ours from error
        traffic.count("requests_throttled" if throttled else "requests_repeated")
        return pause


def attempt(call: Callable[[], T], uri: str, doing: str) -> T:
    """Run a call that blocks; transient failures are repeated."""
    tries = Tries(uri, doing)
    while True:
        try:
            return call()
        except SegbatchError:
            raise
        except Exception as error:  # noqa: BLE001 (the drivers raise their own trees)
            time.sleep(tries.failed(error))
