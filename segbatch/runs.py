"""The run protocol: config, plan, commit, resume, finish. See ``ARCHITECTURE.md``.

A run root holds ``.segbatch/config.json`` (what decides the output), ``.segbatch/plans/<n>.json`` with its items and
shards, one Parquet file per shard in the table folder, and ``.segbatch/SUCCESS-<n>`` once every planned row is there.
Every file that two drivers could both want is created with put-if-absent, so any number of drivers may work on one
root: they adopt each other's plans, and a shard's file is its own commit record.
"""

import datetime
import itertools
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from segbatch import planning, schemas, storage, tables
from segbatch.config import PlanConfig, differences, digest_of
from segbatch.drivers import PATIENCE_S, Driver, look
from segbatch.errors import ConfigError, EngineError, IncompleteRunError, ObjectExists, ObjectMissing
from segbatch.planning import PlanInfo, items_of
from segbatch.records import OK, Outcome, PlanItem, ShardRef
from segbatch.shards import Present, Shards
from segbatch.storage import ObjectInfo
from segbatch.tables import service
from segbatch.version import __version__

__all__ = ["Journal", "Run", "RunState", "Task", "Worker", "commit", "committed", "items_of"]

_COMMIT_ATTEMPTS = 5
_LOG_EVERY = 256
_MEASURED = 1000
"""Outcomes by which later plans size their shards."""

_FEWEST_ROWS, _MOST_ROWS = 16, 8192
"""Of a shard that is sized by what its rows will take."""

_LOGS_AT_A_TIME = 32
_FOOTERS_AT_A_TIME = 16
_OUTCOME_KEYS = tuple(f.name for f in fields(Outcome))


class Journal(Protocol):
    """Where a worker notes what it is about to touch, so that a death can be traced to a sample."""

    def note(self, slot: str, shard: int, sample_ids: Sequence[str]) -> None:
        """``sample_ids`` of a shard are being worked on by ``slot`` (a thread or a stage)."""
        ...

    def clear(self, slot: str) -> None:
        """``slot`` is idle."""
        ...


class Worker(Protocol):
    """What an actor holds: opened once, then fed shards, at most ``in_flight`` at a time from as many threads."""

    @property
    def rows_done(self) -> int:
        """Rows finished so far, counted up during work."""
        ...

    def run(self, shard: ShardRef, skip: Mapping[str, str]) -> Outcome:
        """Work on a shard and commit its result; ``skip`` maps quarantined sample ids to the reason."""
        ...

    def probe(self, shard: ShardRef, sample_id: str) -> None:
        """Do everything with one sample except writing; used in a process of its own to find one that kills."""
        ...

    def close(self) -> None:
        """Release what was opened."""
        ...


class Task(Protocol):
    """A picklable recipe for a worker."""

    def open(self, threads: int, journal: Journal) -> Worker:
        """Open it in the process that will work; ``threads`` is that process's share of the machine."""
        ...


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands. ``bad``, ``reasons`` and ``issues`` cover the shards that are written."""

    root: str
    table: str
    plans: int
    shards: int
    shards_done: int
    rows: int
    rows_done: int
    bad: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    issues: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every planned shard is written."""
        return self.shards == self.shards_done


@dataclass(frozen=True, slots=True)
class RunStatus(RunState):
    """Where a run stands and who is at work on it.

    Attributes:
        drivers: those that are at work, and those that died without taking leave.
        quarantined: samples that killed their process, with the reason.
    """

    drivers: tuple[Driver, ...] = ()
    quarantined: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_live(self) -> bool:
        """Whether a driver is at work."""
        return any(d.alive for d in self.drivers)

    @property
    def per_s(self) -> float:
        """Images a second of all drivers together, over the last five minutes."""
        return sum(d.per_s for d in self.drivers if d.alive)

    @property
    def eta_s(self) -> float | None:
        """Seconds until every planned row is there, at that speed; None where nothing moves."""
        return (self.rows - self.rows_done) / self.per_s if self.per_s else None


class Run:
    """One run root. Cheap to open; safe to open by several drivers at once."""

    def __init__(self, root: str, table: str) -> None:
        self.root = storage.resolve(root)
        self.table = table
        self._log: list[Outcome] = []
        self._log_lock = threading.Lock()

    @classmethod
    def open(cls, root: str, table: str, verb: str, config: dict[str, Any]) -> "Run":
        """Claim ``root`` for ``config``, or join those who did.

        Raises:
            ConfigError: the root belongs to another configuration; says which keys differ.
            StorageError: the root cannot be written.
        """
        run = cls(root, table)
        found = run.document()
        if found is None:
            storage.check_writable(run.root)
            document = {
                "segbatch": __version__,
                "verb": verb,
                "created": _now(),
                "digest": digest_of([verb, config]),
                "config": config,
            }
            try:
                storage.create(service(run.root, "config.json"), json.dumps(document, indent=1).encode())
                return run
            except ObjectExists:
                found = run.document()
        run._check_same(found or {}, verb, config)
        return run

    def _check_same(self, found: dict[str, Any], verb: str, config: dict[str, Any]) -> None:
        if found.get("digest") == digest_of([verb, config]):
            return
        if found.get("verb") != verb:
            raise ConfigError(f"{self.root} holds the output of segbatch {found.get('verb')}", "choose another output")
        changed = "; ".join(differences(found.get("config", {}), json.loads(json.dumps(config))))
        raise ConfigError(
            f"{self.root} was made with another configuration: {changed}", "choose another output, or delete this one"
        )

    def document(self) -> dict[str, Any] | None:
        """The content of ``config.json``; None when the root is not claimed."""
        try:
            document: dict[str, Any] = json.loads(storage.read_bytes(service(self.root, "config.json")))
        except ObjectMissing:
            return None
        return document

    # -- plan --------------------------------------------------------------------------------------------------

    def plans(self) -> list[PlanInfo]:
        """The published plans in order."""
        return planning.published(self.root)

    def plan(
        self,
        listing: Callable[[], Iterable[PlanItem]],
        options: PlanConfig,
        complete: bool = True,
        grouped: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> PlanInfo | None:
        """Plan what is new, changed or gone since the plans so far; None when there is nothing to plan.

        Args:
            listing: gives the input as it is now, streamed; called again when another driver published first.
            options: how to cut shards.
            complete: ``listing`` gives the whole input, so that planned items which it lacks have vanished.
            grouped: neighbours of one ``group_id`` in one listing lie in one shard; see ``planning.cut``.
            before: called when a plan is about to be published.
        """
        return planning.publish(self.root, self.table, listing, self._sized(options), complete, grouped, before)

    def _sized(self, options: PlanConfig) -> PlanConfig:
        """Shards of about ``shard_seconds``, by what the rows of earlier plans took; as they are where none did."""
        done = itertools.chain.from_iterable(outcomes for _, outcomes in self._logs())
        measured = [
            (o.rows - o.copied, o.seconds["total"])
            for o in itertools.islice(done, _MEASURED)
            if o.seconds.get("total") and o.rows > o.copied
        ]
        rows, seconds = (sum(column) for column in zip(*measured, strict=True)) if measured else (0, 0.0)
        if not rows:
            return options
        wanted = round(options.shard_seconds * rows / seconds)
        return options.model_copy(update={"usual_rows": min(max(wanted, _FEWEST_ROWS), _MOST_ROWS)})

    def shards(self) -> Shards:
        """Every shard of the run in its latest plan, newest plan first."""
        return planning.latest_shards(self.root, self.table, self.plans())

    def lacking(self) -> Shards:
        """Shards whose result is not there yet: O(shards), no input is read."""
        shards = self.shards()
        return shards.where(~self._is_done(shards, self._present()))

    def missing(self) -> Iterator[ShardRef]:
        """The same, one by one."""
        return iter(self.lacking())

    def to_retry(self) -> Shards:
        """Written shards that hold bad rows, to be retried."""
        written, present = self._written(self.shards())
        numbers = [o.shard for o in self._outcomes(written, present) if o.bad]
        return replace(written.numbered(numbers), retry=True)

    def failed(self) -> Iterator[ShardRef]:
        """The same, one by one."""
        return iter(self.to_retry())

    def _present(self) -> Present:
        return Present(tables.list_parts(storage.join(self.root, self.table)))

    def _written(self, shards: Shards) -> tuple[Shards, Present]:
        """Those of ``shards`` whose result is there, and the listing that says so: it is newer than their plans."""
        present = self._present()
        return shards.where(self._is_done(shards, present)), present

    def _is_done(self, shards: Shards, present: Present) -> NDArray[np.bool_]:
        """Whether each result is there; for a rewritten shard, the result of that plan or a later one."""
        done: NDArray[np.bool_] = present.places(shards) >= 0
        in_doubt = done & shards.numpy("rewrite")
        if in_doubt.any():
            doubtful = shards.where(in_doubt)
            plans = {o.shard: o.plan for o in self._outcomes(doubtful, present)}
            cells = (doubtful.numpy(c).tolist() for c in ("number", "plan"))
            done[in_doubt] = [plans[number] >= plan for number, plan in zip(*cells, strict=True)]
        return done

    # -- outcomes ----------------------------------------------------------------------------------------------

    def record(self, outcome: Outcome) -> None:
        """Remember an outcome; written in bulk, so that finishing does not read a footer per shard."""
        with self._log_lock:
            self._log.append(outcome)
            full = len(self._log) >= _LOG_EVERY
        if full:
            self.flush()

    def flush(self) -> None:
        """Write the outcomes recorded since the last flush."""
        with self._log_lock:
            lines, self._log = self._log, []
        if lines:
            name = f"{_now(compact=True)}-{uuid.uuid4().hex[:12]}.jsonl"
            text = "\n".join(json.dumps({name: getattr(o, name) for name in _OUTCOME_KEYS}) for o in lines)
            storage.replace(service(self.root, "outcomes", name), text.encode())  # the name is nobody else's

    def outcomes(self) -> dict[int, Outcome]:
        """Outcome of every written shard by number, 1 kB each; see ``state`` for sums."""
        return {o.shard: o for o in self._outcomes(self.shards(), self._present())}

    def _outcomes(self, shards: Shards, present: Present) -> Iterator[Outcome]:
        """Outcome of each shard whose result is there, in any order: from the logs where they are current, else from
        the footers.
        """
        sought = _Sought(shards, present)
        for _, outcomes in self._logs():
            yield from sought.current(outcomes)
        unknown = zip(shards.where(sought.open), sought.open_places(), strict=True)
        with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
            while chunk := list(itertools.islice(unknown, _LOG_EVERY)):
                infos = present.infos(chunk)
                yield from pool.map(lambda pair, i: _outcome(pair[0], tables.footer(i.uri), i), chunk, infos)

    def _logs(self) -> Iterator[tuple[ObjectInfo, list[Outcome]]]:
        """Every outcome log."""
        logs = storage.list_files(service(self.root, "outcomes"), (".jsonl",))
        while chunk := list(itertools.islice(logs, _LOGS_AT_A_TIME)):
            for info, data in zip(chunk, storage.read_many(i.uri for i in chunk), strict=True):
                lines: list[dict[str, Any]] = json.loads(b"[" + b",".join(data.splitlines()) + b"]")
                yield info, [Outcome(**{k: line[k] for k in _OUTCOME_KEYS if k in line}) for line in lines]

    def void_logs(self) -> Iterator[ObjectInfo]:
        """Outcome logs that tell of no result that is there, or only what another log tells."""
        sought = _Sought(self.shards(), self._present())
        for info, outcomes in self._logs():
            if not list(sought.current(outcomes)):
                yield info

    def complaints(self, shard: int, with_issues: bool) -> Iterator[str]:
        """What is wrong in a written shard, row by row: bad rows, and issues of good rows where asked for."""
        key = next((s.key for s in self.shards().numbered([shard])), "")
        columns = [c for c in ("sample_id", "status", "error", "issues") if c in schemas.TABLES[self.table].names]
        for batch in tables.batches(storage.join(self.root, self.table, key), self.table, columns):
            for row in batch.to_pylist():
                messages = [i["message"] for i in row.get("issues") or ()] or [row.get("error") or row["status"]]
                if row["status"] != OK or (with_issues and row.get("issues")):
                    yield from (f"{row['sample_id']}: {m}" for m in messages)

    # -- finish ------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Planned against written, from one listing of each and the outcomes."""
        plans = self.plans()
        shards = planning.latest_shards(self.root, self.table, plans)
        written, present = self._written(shards)
        rows = bad = 0
        reasons: Counter[str] = Counter()
        issues: Counter[str] = Counter()
        for outcome in self._outcomes(written, present):
            rows, bad = rows + outcome.rows, bad + outcome.bad
            if outcome.reasons or outcome.issues:
                reasons.update(outcome.reasons)
                issues.update(outcome.issues)
        return RunState(
            self.root,
            self.table,
            plans=len(plans),
            shards=len(shards),
            shards_done=len(written),
            rows=shards.rows,
            rows_done=rows,
            bad=bad,
            reasons=dict(reasons),
            issues=dict(issues),
        )

    def status(self, patience_s: float = PATIENCE_S) -> RunStatus:
        """``state``, and who is at work; see ``drivers.look``."""
        found = look([self.root], patience_s)[self.root]
        state = self.state()
        known = {f.name: getattr(state, f.name) for f in fields(RunState)}
        return RunStatus(**known, drivers=tuple(found), quarantined=self.quarantine())

    def finish(self) -> RunState:
        """Check planned == written and rows in == rows out, then write the manifest and the success markers.

        Raises:
            IncompleteRunError: says what is missing.
        """
        self.flush()
        storage.sweep_temporary(self.root)
        state = self.state()
        if not state.complete or state.rows != state.rows_done:
            lacking = [s.number for s in itertools.islice(self.missing(), 4)]
            shown = ", ".join(str(n) for n in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            raise IncompleteRunError(
                f"{self.root}: {state.shards_done} of {state.shards} shards and {state.rows_done} of {state.rows} rows "
                f"are there{f'; missing: shard {shown}' if lacking else ''}",
                "run the same command again",
            )
        manifest = {"finished": _now(), "segbatch": __version__, **asdict(state)}
        storage.replace(service(self.root, "manifest.json"), json.dumps(manifest, indent=1).encode())
        for plan in range(state.plans):
            try:
                storage.create(service(self.root, f"SUCCESS-{plan}"), b"")
            except ObjectExists:
                continue
        return state

    # -- quarantine --------------------------------------------------------------------------------------------

    def quarantine(self) -> dict[str, str]:
        """Samples that killed their process, with the reason; not those whose file has changed since."""
        return {e["sample_id"]: e["reason"] for _, e, holds in self._quarantined() if holds}

    def stale_quarantine(self) -> list[ObjectInfo]:
        """Files of those whose file has changed since."""
        return [info for info, _, holds in self._quarantined() if not holds]

    def _quarantined(self) -> list[tuple[ObjectInfo, dict[str, Any], bool]]:
        """File and content of every entry, and whether the sample is as it was when it killed."""
        infos = list(storage.list_files(service(self.root, "quarantine"), (".json",)))
        entries: list[dict[str, Any]] = [json.loads(data) for data in storage.read_many(i.uri for i in infos)]
        numbers = {e["shard"] for e in entries}
        shards = {s.number: s for s in self.shards().numbered(numbers)} if entries else {}
        return [(i, e, _still_holds(e, shards.get(e["shard"]))) for i, e in zip(infos, entries, strict=True)]

    def add_quarantine(self, shard: ShardRef, sample_id: str, reason: str) -> None:
        """Persist that a sample of ``shard`` kills its process."""
        entry = {"sample_id": sample_id, "reason": reason, "shard": shard.number, "plan": shard.plan}
        entry["etag"] = _etag_of(shard, sample_id)
        storage.replace(service(self.root, "quarantine", f"{digest_of(sample_id)}.json"), json.dumps(entry).encode())

    def clear_quarantine(self) -> None:
        """Give quarantined samples another chance (``retry --failed``)."""
        for info in storage.list_files(service(self.root, "quarantine"), (".json",)):
            storage.delete(info.uri)


class _Sought:
    """Shards whose outcome is not known yet."""

    def __init__(self, shards: Shards, present: Present) -> None:
        self._present = present
        self._places = present.places(shards)
        numbers = shards.numpy("number")
        self._order = np.argsort(numbers)
        self._numbers = numbers[self._order]
        self.open: NDArray[np.bool_] = self._places >= 0

    def open_places(self) -> list[int]:
        """Where the results of the open ones stand in the listing."""
        return self._places[self.open].tolist()  # type: ignore[no-any-return]

    def current(self, outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
        """Those of ``outcomes`` that tell of a result that is there, each shard's once."""
        numbers = np.array([o.shard for o in outcomes], np.int64)
        found = np.searchsorted(self._numbers, numbers)
        known = found < len(self._numbers)
        known[known] = self._numbers[found[known]] == numbers[known]
        rows = self._order[found[known]]
        tags = self._present.tags(self._places[rows])
        for i, row, tag in zip(np.flatnonzero(known).tolist(), rows.tolist(), tags, strict=True):
            if self.open[row] and outcomes[i].etag == tag:  # numbers and tags alone may repeat
                self.open[row] = False
                yield outcomes[i]


def _etag_of(shard: ShardRef, sample_id: str) -> str:
    """The planned tag of a sample; empty where the plan holds ranges of rows."""
    return next((i.etag for i in items_of(shard) if i.sample_id == sample_id), "")


def _still_holds(entry: Mapping[str, Any], shard: ShardRef | None) -> bool:
    """Whether a quarantined sample is as it was when it killed."""
    if shard is None:
        return False
    return bool(entry["plan"] == shard.plan or (entry["etag"] and entry["etag"] == _etag_of(shard, entry["sample_id"])))


def committed(shard: ShardRef) -> Outcome | None:
    """The outcome of a shard that has been finished already, by whomever; None when there is work to do."""
    if shard.mode == "retry":
        return None
    found = storage.stat(shard.uri)
    return None if found is None else _of_other(shard, found)


def commit(
    shard: ShardRef,
    writer: tables.PartWriter,
    seconds: Mapping[str, float],
    extra: Mapping[str, str] | None = None,
    basis: str = "",
    copied: int = 0,
) -> Outcome:
    """Publish a shard's result so that it is there once and whole, whoever else tries.

    Args:
        shard: what was worked on; its mode says whether a result may be there already.
        writer: the finished rows.
        seconds: wall time by stage.
        extra: more key-value pairs for the footer.
        basis: tag of the result that rows were copied from (mode ``retry``); another one by now wins.
        copied: how many they are.

    Raises:
        EngineError: the rows are not those that were planned, or the key holds something else.
        StorageError: it cannot be written.
    """
    began = time.perf_counter()
    if writer.rows != shard.rows:
        raise EngineError(f"shard {shard.number}: {writer.rows} rows instead of {shard.rows}", "please report this")
    footer = {
        "segbatch.version": __version__,
        "segbatch.plan": str(shard.plan),
        "segbatch.shard": str(shard.number),
        "segbatch.attempt": uuid.uuid4().hex,
        "segbatch.rows": str(writer.rows),
        "segbatch.bad": str(writer.bad),
        "segbatch.copied": str(copied),
        "segbatch.reasons": json.dumps(dict(writer.reasons)),
        "segbatch.issues": json.dumps(dict(writer.issues)),
        "segbatch.seconds": json.dumps({k: round(v, 4) for k, v in seconds.items()}),
        **(extra or {}),
    }
    outcome = _publish(shard, writer.finish(footer), footer, basis)
    return replace(outcome, seconds={**outcome.seconds, "write": time.perf_counter() - began})


def _publish(shard: ShardRef, data: bytes, footer: Mapping[str, str], basis: str) -> Outcome:
    for _ in range(_COMMIT_ATTEMPTS):
        before = storage.stat(shard.uri)
        if before is not None and not (shard.mode == "retry" and before.etag == basis and not _is_newer(shard)):
            other = _of_other(shard, before, footer["segbatch.attempt"])
            if other is not None:
                return other
        try:
            if before is None:
                storage.create(shard.uri, data)
            else:
                storage.replace(shard.uri, data, before.etag)
        except ObjectExists:
            continue  # somebody was faster, or only the reply was lost: the next look tells
        found = storage.stat(shard.uri)
        if found is not None:
            return _outcome(shard, footer, found)
    raise EngineError(f"{shard.uri} changes under our hands", "is another segbatch version writing there?")


def _of_other(shard: ShardRef, found: ObjectInfo, attempt: str = "") -> Outcome | None:
    """The outcome of the result that is there; None when it is of an older plan.

    Raises:
        EngineError: it is not a result of this shard.
    """
    footer = tables.footer(shard.uri)
    if footer.get("segbatch.shard") != str(shard.number):
        raise EngineError(f"{shard.uri} is not the result of shard {shard.number}", "move that file away")
    if _plan_of(footer) < shard.plan:
        return None
    return replace(_outcome(shard, footer, found), committed_by_other=footer.get("segbatch.attempt") != attempt)


def _is_newer(shard: ShardRef) -> bool:
    """Whether the result that is there is of a later plan: the shard has been made again since."""
    return _plan_of(tables.footer(shard.uri)) > shard.plan


def _plan_of(footer: Mapping[str, str]) -> int:
    return int(footer.get("segbatch.plan", -1))


def _outcome(shard: ShardRef, footer: Mapping[str, str], found: ObjectInfo) -> Outcome:
    """A shard's outcome as its footer tells it."""
    return Outcome(
        shard=shard.number,
        plan=int(footer.get("segbatch.plan", shard.plan)),
        rows=int(footer.get("segbatch.rows", 0)),
        bad=int(footer.get("segbatch.bad", 0)),
        reasons=json.loads(footer.get("segbatch.reasons", "{}")),
        issues=json.loads(footer.get("segbatch.issues", "{}")),
        bytes_out=found.size,
        seconds=json.loads(footer.get("segbatch.seconds", "{}")),
        etag=found.etag,
        copied=int(footer.get("segbatch.copied", 0)),
    )


def _now(compact: bool = False) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y%m%dT%H%M%S%f") if compact else now.isoformat(timespec="seconds")
