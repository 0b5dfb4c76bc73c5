"""Who is at work on a run root: every driver writes a heartbeat file now and then.

``.segbatch/drivers/<uuid>.json``: one small PUT every ten seconds, taken away at the end. Whether a driver lives is
told without any clock: on its own machine by the process table, elsewhere by whether the file's tag changes while one
looks.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from segbatch import storage
from segbatch.errors import ObjectMissing, StorageError
from segbatch.tables import service

BEAT_S = 10.0
"""How often a driver says that it lives."""

PATIENCE_S = 3 * BEAT_S
"""A file that does not change for so long is that of a driver that died."""

_WINDOW_S = 300.0
_LOOK_EVERY_S = 1.0
_FOLDER = "drivers"


@dataclass(frozen=True, slots=True)
class Driver:
    """What a heartbeat says.

    Attributes:
        driver: its own uuid.
        verb: what it does.
        host, pid: where it runs.
        machine, process: tell whether a process of this machine is that one (boot and pid namespace; start time).
        started: UTC, by its own clock; only to be shown.
        beat: counts up.
        phase: ``planning``, ``working`` or ``finishing``.
        seconds: since it began to work on shards.
        rows, bad, total: images finished, bad ones among them, and images to do in this call.
        per_s: images a second over the last five minutes, by its own monotonic clock.
        workers: where its actors are (node, process, log); empty where it works itself.
        alive: whether it lives; see ``look``.
    """

    driver: str
    verb: str
    host: str
    pid: int
    machine: str
    process: str
    started: str
    beat: int = 0
    phase: str = "planning"
    seconds: float = 0.0
    rows: int = 0
    bad: int = 0
    total: int = 0
    per_s: float = 0.0
    workers: tuple[str, ...] = ()
    alive: bool = False

    @property
    def name(self) -> str:
        """For messages: verb, host and process."""
        return f"segbatch {self.verb} on {self.host}, process {self.pid}"


class Heartbeat:
    """This driver's own; may be told of progress as often as one likes."""

    def __init__(self, root: str, verb: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        self._said = Driver(uuid.uuid4().hex, verb, platform.node(), pid, storage.machine(), _process(pid) or "", now)
        self._uri = service(root, _FOLDER, f"{self._said.driver}.json")
        self._lock = threading.Lock()
        self._began = 0.0
        self._done = (0, 0)
        self._history = deque([(time.monotonic(), 0)])
        self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Say so once, then every ``BEAT_S``, and whenever the actors are others.

        Raises:
            StorageError: the first one cannot be written.
        """
        self._put()
        self._thread.start()

    def begin(self, total: int) -> None:
        """Work on ``total`` rows begins."""
        with self._lock:
            self._began = time.monotonic()
            self._history = deque([(self._began, 0)])
            self._done = (0, 0)
            self._said = replace(self._said, phase="working", total=total)

    def advance(self, rows: int, bad: int) -> None:
        """``rows`` of them are finished, ``bad`` of them badly."""
        with self._lock:
            self._done = (rows, bad)
            now = time.monotonic()
            if now - self._history[-1][0] >= _LOOK_EVERY_S:
                self._history.append((now, rows))
                while now - self._history[0][0] > _WINDOW_S:
                    self._history.popleft()

    def others_did(self, rows: int) -> None:
        """So many more of the rows that it will tell next are other drivers' work: they are no part of its speed."""
        with self._lock:
            self._history = deque((when, there + rows) for when, there in self._history)

    def work_at(self, places: Sequence[str]) -> None:
        """Its actors are there now."""
        with self._lock:
            self._said = replace(self._said, workers=tuple(places))
        self._wake.set()

    def end(self) -> None:
        """Nothing is in flight any more."""
        with self._lock:
            self._said = replace(self._said, phase="finishing", workers=())

    def close(self) -> None:
        """Take the file away; a store that refuses is not worth an error."""
        self._over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)  # a store that hangs does not hold the end of the run
        try:
            storage.delete(self._uri)
        except StorageError:
            return

    def _beat(self) -> None:
        while True:
            self._wake.wait(BEAT_S)
            self._wake.clear()
            if self._over:
                return
            try:
                self._put()
            except StorageError:
                continue  # the work goes on; who looks meanwhile sees no heartbeat

    def _put(self) -> None:
        with self._lock:
            (rows, bad), (seconds, per_s) = self._done, self._speed()
            known = replace(self._said, rows=rows, bad=bad, seconds=seconds, per_s=per_s)
            self._said = replace(known, beat=known.beat + 1)
            data = {k: v for k, v in asdict(self._said).items() if k != "alive"}
        storage.replace(self._uri, json.dumps(data).encode())

    def _speed(self) -> tuple[float, float]:
        """Seconds of work so far, and images a second over the last minutes."""
        if self._said.phase != "working":
            return self._said.seconds, 0.0
        now = time.monotonic()
        since, rows = self._history[0]
        per_s = (self._done[0] - rows) / (now - since) if now > since else 0.0
        return round(now - self._began, 1), round(max(per_s, 0.0), 3)


@contextmanager
def beating(root: str, verb: str) -> Iterator[Heartbeat]:
    """A heartbeat for as long as the block runs."""
    heartbeat = Heartbeat(root, verb)
    heartbeat.start()
    try:
        yield heartbeat
    finally:
        heartbeat.close()


def heartbeats(root: str) -> dict[str, tuple[str, Driver]]:
    """By URI: tag and content of every heartbeat file of a run root."""
    infos = list(storage.list_files(service(root, _FOLDER), (".json",)))
    found = {}
    for info in infos:
        try:
            said = json.loads(storage.read_bytes(info.uri))
        except ObjectMissing:
            continue  # it has just ended
        said["workers"] = tuple(said.get("workers", ()))
        found[info.uri] = (info.etag, Driver(**{k: v for k, v in said.items() if k in Driver.__slots__}))
    return found


def look(roots: Sequence[str], patience_s: float = PATIENCE_S) -> dict[str, list[Driver]]:
    """The drivers of each run root, those that died included, and which of them live.

    Returns at once where all of them ran on this machine; else when every file has changed, or after ``patience_s``.
    """
    first = {root: heartbeats(root) for root in roots}
    verdicts = {uri: _lives_here(d) for found in first.values() for uri, (_, d) in found.items()}
    until = time.monotonic() + patience_s
    latest = {root: {uri: d for uri, (_, d) in found.items()} for root, found in first.items()}
    while any(v is None for v in verdicts.values()) and time.monotonic() < until:
        time.sleep(min(_LOOK_EVERY_S, patience_s))
        for root in [r for r, found in first.items() if any(verdicts[uri] is None for uri in found)]:
            _look_again(heartbeats(root), first[root], verdicts, latest[root])
    return {root: _judged(found, verdicts) for root, found in latest.items()}


def _look_again(
    now: dict[str, tuple[str, Driver]],
    first: dict[str, tuple[str, Driver]],
    verdicts: dict[str, bool | None],
    latest: dict[str, Driver],
) -> None:
    for uri in first:
        if uri not in now:  # it has ended as it should
            verdicts[uri] = False
            latest.pop(uri, None)
        elif now[uri][0] != first[uri][0]:
            verdicts[uri], latest[uri] = True, now[uri][1]


def _judged(found: dict[str, Driver], verdicts: dict[str, bool | None]) -> list[Driver]:
    judged = [replace(d, alive=bool(verdicts[uri])) for uri, d in found.items()]
    return sorted(judged, key=lambda d: (not d.alive, d.started))


def _lives_here(driver: Driver) -> bool | None:
    """Whether it is a process of this machine that runs; None where only its files can tell."""
    return _process(driver.pid) == driver.process if driver.machine == storage.machine() else None


def _process(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot (proc(5), field 22 of ``stat``); None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
