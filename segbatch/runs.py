"""The run protocol: config, plan, commit, resume, finish. See ``ARCHITECTURE.md``.

A run root holds ``.segbatch/config.json`` (what decides the output), ``.segbatch/plans/<n>.json`` with its items and
shards, one Parquet file per shard in the table folder, and ``.segbatch/SUCCESS-<n>`` once every planned row is there.
Every file that two drivers could both want is created with put-if-absent, so any number of drivers may work on one
root: they adopt each other's plans, and a shard's file is its own commit record.
"""

import datetime
import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from segbatch import planning, storage, tables
from segbatch.config import PlanConfig, differences, digest_of
from segbatch.errors import ConfigError, EngineError, IncompleteRunError, ObjectExists, ObjectMissing
from segbatch.planning import PlanInfo, items_of
from segbatch.records import Outcome, PlanItem, ShardRef
from segbatch.storage import ObjectInfo
from segbatch.tables import service
from segbatch.version import __version__

__all__ = ["Journal", "Run", "RunState", "Task", "Worker", "commit", "items_of"]

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
    """Where a run stands. ``bad`` and ``reasons`` cover the shards that are written."""

    root: str
    table: str
    plans: int
    shards: int
    shards_done: int
    rows: int
    rows_done: int
    bad: int
    reasons: Mapping[str, int] = field(default_factory=dict)

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
        self, listing: Callable[[], Iterable[PlanItem]], options: PlanConfig, complete: bool = True
    ) -> PlanInfo | None:
        """Plan what is new, changed or gone since the plans so far; None when there is nothing to plan.

        Args:
            listing: gives the input as it is now, streamed; called again when another driver published first.
            options: how to cut shards.
            complete: ``listing`` gives the whole input, so that planned items which it lacks have vanished.
        """
        return planning.publish(self.root, self.table, listing, options, complete)

    def shards(self) -> Iterator[ShardRef]:
        """Every shard of the run in its latest plan, newest plan first."""
        return planning.latest_shards(self.root, self.table, self.plans())

    def missing(self) -> Iterator[ShardRef]:
        """Shards whose result is not there yet: O(shards), no input is read."""
        present = self._present()
        for shard in self.shards():
            found = present.get(shard.key)
            if found is None or (shard.mode == "rewrite" and not self._is_at(found, shard.plan)):
                yield shard

    def failed(self) -> Iterator[ShardRef]:
        """Written shards that hold bad rows, as references to retry."""
        outcomes = self.outcomes()
        for shard in self.shards():
            outcome = outcomes.get(shard.number)
            if outcome is not None and outcome.bad:
                yield replace(shard, mode="retry")

    def _present(self) -> dict[str, ObjectInfo]:
        return {storage.name_of(p.uri): p for p in tables.parts(storage.join(self.root, self.table))}

    def _is_at(self, part: ObjectInfo, plan: int) -> bool:
        return int(tables.footer(part.uri).get("segbatch.plan", -1)) >= plan

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
            storage.create(service(self.root, "outcomes", name), text.encode())

    def outcomes(self) -> dict[int, Outcome]:
        """Outcome of every written shard by number: from the logs where they are current, else from the footer."""
        present = self._present()
        logged = {o.etag: o for o in self._logged()}
        shards = [s for s in self.shards() if s.key in present]
        known = {s.number: logged[present[s.key].etag] for s in shards if present[s.key].etag in logged}
        unknown = [s for s in shards if s.number not in known]
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda s: _outcome(s, tables.footer(s.uri), present[s.key]), unknown)
            return known | {s.number: o for s, o in zip(unknown, read, strict=True)}

    def _logged(self) -> Iterator[Outcome]:
        logs = [i.uri for i in storage.list_files(service(self.root, "outcomes"), (".jsonl",))]
        for data in storage.read_many(logs):
            for line in data.decode().splitlines():
                yield Outcome(**json.loads(line))

    # -- finish ------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Planned against written, from listings and outcomes."""
        outcomes = self.outcomes()
        shards = list(self.shards())
        waiting = {s.number for s in self.missing()}
        done = [outcomes[s.number] for s in shards if s.number in outcomes and s.number not in waiting]
        reasons: Counter[str] = Counter()
        for outcome in done:
            reasons.update(outcome.reasons)
        return RunState(
            self.root,
            self.table,
            plans=len(self.plans()),
            shards=len(shards),
            shards_done=len(done),
            rows=sum(s.rows for s in shards),
            rows_done=sum(o.rows for o in done),
            bad=sum(o.bad for o in done),
            reasons=dict(reasons),
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
            raise IncompleteRunError(
                f"{self.root}: {state.shards_done} of {state.shards} shards and {state.rows_done} of {state.rows} rows "
                "are there",
                "run the same command again",
            )
        manifest = {"finished": _now(), "segbatch": __version__, **asdict(state)}
        storage.replace(service(self.root, "manifest.json"), json.dumps(manifest, indent=1).encode())
        for info in self.plans():
            try:
                storage.create(service(self.root, f"SUCCESS-{info.plan}"), b"")
            except ObjectExists:
                continue
        return state

    # -- quarantine --------------------------------------------------------------------------------------------

    def quarantine(self) -> dict[str, str]:
        """Samples that killed their process, with the reason."""
        entries = [i.uri for i in storage.list_files(service(self.root, "quarantine"), (".json",))]
        read = (json.loads(data) for data in storage.read_many(entries))
        return {e["sample_id"]: e["reason"] for e in read}

    def add_quarantine(self, sample_id: str, reason: str) -> None:
        """Persist that a sample kills its process."""
        data = json.dumps({"sample_id": sample_id, "reason": reason}).encode()
        storage.replace(service(self.root, "quarantine", f"{digest_of(sample_id)}.json"), data)

    def clear_quarantine(self) -> None:
        """Give quarantined samples another chance (``retry --failed``)."""
        for info in storage.list_files(service(self.root, "quarantine"), (".json",)):
            storage.delete(info.uri)


def commit(
    shard: ShardRef, writer: tables.PartWriter, seconds: Mapping[str, float], extra: Mapping[str, str] | None = None
) -> Outcome:
    """Publish a shard's result so that it is there once and whole, whoever else tries.

    Args:
        shard: what was worked on; its mode says whether a result may be there already.
        writer: the finished rows.
        seconds: wall time by stage.
        extra: more key-value pairs for the footer.

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
        "segbatch.reasons": json.dumps(dict(writer.reasons)),
        "segbatch.seconds": json.dumps({k: round(v, 4) for k, v in seconds.items()}),
        **(extra or {}),
    }
    return _publish(shard, writer.finish(footer), footer)


def _publish(shard: ShardRef, data: bytes, footer: dict[str, str]) -> Outcome:
    for _ in range(_COMMIT_ATTEMPTS):
        before = storage.stat(shard.uri) if shard.mode != "create" else None
        by_other = False
        try:
            if before is None:
                storage.create(shard.uri, data)
            else:
                storage.replace(shard.uri, data, before.etag)
        except ObjectExists:
            mine, footer_there = footer, tables.footer(shard.uri)
            if int(footer_there.get("segbatch.shard", -1)) != shard.number:
                raise EngineError(
                    f"{shard.uri} is not the result of shard {shard.number}", "move that file away"
                ) from None
            if int(footer_there.get("segbatch.plan", -1)) < shard.plan:
                continue  # an older plan's result came in between: overwrite it
            by_other = footer_there["segbatch.attempt"] != mine["segbatch.attempt"]  # else only the reply was lost
            footer = footer_there
        found = storage.stat(shard.uri)
        if found is not None:
            return replace(_outcome(shard, footer, found), committed_by_other=by_other)
    raise EngineError(f"{shard.uri} changes under our hands", "is another segbatch version writing there?")


def _outcome(shard: ShardRef, footer: Mapping[str, str], found: ObjectInfo) -> Outcome:
    """A shard's outcome as its footer tells it."""
    return Outcome(
        shard=shard.number,
        plan=int(footer.get("segbatch.plan", shard.plan)),
        rows=int(footer.get("segbatch.rows", 0)),
        bad=int(footer.get("segbatch.bad", 0)),
        reasons=json.loads(footer.get("segbatch.reasons", "{}")),
        bytes_out=found.size,
        seconds=json.loads(footer.get("segbatch.seconds", "{}")),
        etag=found.etag,
    )


def _now(compact: bool = False) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y%m%dT%H%M%S%f") if compact else now.isoformat(timespec="seconds")
