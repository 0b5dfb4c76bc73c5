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
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from segbatch import planning, schemas, storage, tables
from segbatch.config import PlanConfig, differences, digest_of
from segbatch.errors import ConfigError, EngineError, IncompleteRunError, ObjectExists, ObjectMissing
from segbatch.planning import PlanInfo, items_of
from segbatch.records import OK, Outcome, PlanItem, ShardRef
from segbatch.storage import ObjectInfo
from segbatch.tables import service
from segbatch.version import __version__

__all__ = ["Journal", "Run", "RunState", "Task", "Worker", "commit", "committed", "items_of"]

_COMMIT_ATTEMPTS = 5
_LOG_EVERY = 256


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
    ) -> PlanInfo | None:
        """Plan what is new, changed or gone since the plans so far; None when there is nothing to plan.

        Args:
            listing: gives the input as it is now, streamed; called again when another driver published first.
            options: how to cut shards.
            complete: ``listing`` gives the whole input, so that planned items which it lacks have vanished.
            grouped: neighbours of one ``group_id`` in one listing lie in one shard; see ``planning.cut``.
        """
        return planning.publish(self.root, self.table, listing, options, complete, grouped)

    def shards(self) -> Iterator[ShardRef]:
        """Every shard of the run in its latest plan, newest plan first."""
        return planning.latest_shards(self.root, self.table, self.plans())

    def missing(self) -> Iterator[ShardRef]:
        """Shards whose result is not there yet: O(shards), no input is read."""
        present = self._present()
        return (s for s in self.shards() if not self._is_done(s, present))

    def failed(self) -> Iterator[ShardRef]:
        """Written shards that hold bad rows, as references to retry."""
        shards, present = list(self.shards()), self._present()
        written = [s for s in shards if self._is_done(s, present)]
        outcomes = self._outcomes(written, present)
        return (replace(s, mode="retry") for s in written if outcomes[s.number].bad)

    def _present(self) -> dict[str, ObjectInfo]:
        return {storage.name_of(p.uri): p for p in tables.parts(storage.join(self.root, self.table))}

    def _is_done(self, shard: ShardRef, present: Mapping[str, ObjectInfo]) -> bool:
        """Whether the result is there; for a rewritten shard, the result of that plan or a later one."""
        if shard.key not in present:
            return False
        return shard.mode != "rewrite" or _plan_of(tables.footer(shard.uri)) >= shard.plan

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
            text = "\n".join(json.dumps(asdict(o)) for o in lines)
            storage.replace(service(self.root, "outcomes", name), text.encode())  # the name is nobody else's

    def outcomes(self) -> dict[int, Outcome]:
        """Outcome of every written shard by number: from the logs where they are current, else from the footer."""
        shards, present = list(self.shards()), self._present()
        return self._outcomes([s for s in shards if s.key in present], present)

    def _outcomes(self, shards: Sequence[ShardRef], present: Mapping[str, ObjectInfo]) -> dict[int, Outcome]:
        logged = {(o.shard, o.etag): o for o in self._logged()}  # tags alone may repeat: size and time
        found = {s.number: logged.get((s.number, present[s.key].etag)) for s in shards}
        known = {number: outcome for number, outcome in found.items() if outcome is not None}
        unknown = [s for s in shards if s.number not in known]
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda s: _outcome(s, tables.footer(s.uri), present[s.key]), unknown)
            return known | {s.number: o for s, o in zip(unknown, read, strict=True)}

    def _logged(self) -> Iterator[Outcome]:
        logs = [i.uri for i in storage.list_files(service(self.root, "outcomes"), (".jsonl",))]
        for data in storage.read_many(logs):
            for line in data.decode().splitlines():
                yield Outcome(**json.loads(line))

    def complaints(self, shard: int, with_issues: bool) -> Iterator[str]:
        """What is wrong in a written shard, row by row: bad rows, and issues of good rows where asked for."""
        key = next((s.key for s in self.shards() if s.number == shard), "")
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
        shards = list(planning.latest_shards(self.root, self.table, plans))
        present = self._present()  # after the plans: a shard that is written meanwhile may count, never the other way
        written = [s for s in shards if self._is_done(s, present)]
        done = self._outcomes(written, present).values()
        reasons: Counter[str] = Counter()
        issues: Counter[str] = Counter()
        for outcome in done:
            reasons.update(outcome.reasons)
            issues.update(outcome.issues)
        return RunState(
            self.root,
            self.table,
            plans=len(plans),
            shards=len(shards),
            shards_done=len(done),
            rows=sum(s.rows for s in shards),
            rows_done=sum(o.rows for o in done),
            bad=sum(o.bad for o in done),
            reasons=dict(reasons),
            issues=dict(issues),
        )

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
        uris = [i.uri for i in storage.list_files(service(self.root, "quarantine"), (".json",))]
        entries: list[dict[str, Any]] = [json.loads(data) for data in storage.read_many(uris)]
        numbers = {e["shard"] for e in entries}
        shards = {s.number: s for s in self.shards() if s.number in numbers} if entries else {}
        return {e["sample_id"]: e["reason"] for e in entries if _still_holds(e, shards.get(e["shard"]))}

    def add_quarantine(self, shard: ShardRef, sample_id: str, reason: str) -> None:
        """Persist that a sample of ``shard`` kills its process."""
        entry = {"sample_id": sample_id, "reason": reason, "shard": shard.number, "plan": shard.plan}
        entry["etag"] = _etag_of(shard, sample_id)
        storage.replace(service(self.root, "quarantine", f"{digest_of(sample_id)}.json"), json.dumps(entry).encode())

    def clear_quarantine(self) -> None:
        """Give quarantined samples another chance (``retry --failed``)."""
        for info in storage.list_files(service(self.root, "quarantine"), (".json",)):
            storage.delete(info.uri)


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
    return _publish(shard, writer.finish(footer), footer, basis)


def _publish(shard: ShardRef, data: bytes, footer: Mapping[str, str], basis: str) -> Outcome:
    for _ in range(_COMMIT_ATTEMPTS):
        before = storage.stat(shard.uri)
        if before is not None and not (shard.mode == "retry" and before.etag == basis):
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
