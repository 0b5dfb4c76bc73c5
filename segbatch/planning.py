"""Plans: an input listing cut into shards, written once and adopted by every driver.

``.segbatch/plans/<uuid>/items-*.parquet`` holds the items (at most ``PART_ROWS`` a file), ``shards.parquet`` beside
it one row per shard; ``.segbatch/plans/<n>.json``, put-if-absent, makes them plan ``n``.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from segbatch import storage
from segbatch.config import PlanConfig
from segbatch.errors import ConfigError, ObjectExists
from segbatch.records import PlanItem, ShardRef
from segbatch.shards import INDEX, Shards
from segbatch.tables import service

if TYPE_CHECKING:
    import duckdb

PART_ROWS = 1_000_000
_PART_BYTES = 64 << 20
_INDEX = "shards.parquet"
_GROUP_ROWS = 4096
_SMALL = 4096
_MIN_SHARD_ROWS = 16
_WANTED_SHARDS = 16
_LARGEST_GROUP = 512 << 20
_RUN_IDS = 1 << 21
_DUCKDB_MEMORY = "400MB"

_ITEM_FIELDS = [
    pa.field("sample_id", pa.string()),
    pa.field("uri", pa.string()),
    pa.field("etag", pa.string()),
    pa.field("bytes", pa.int64()),
    pa.field("rows", pa.int64()),
    pa.field("row_start", pa.int64()),
    pa.field("detail", pa.string()),
    pa.field("group_id", pa.string()),
    pa.field("split", pa.string()),
]
_ITEMS = pa.schema([pa.field("shard", pa.int64()), *_ITEM_FIELDS])


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """What ``plans/<n>.json`` says.

    Attributes:
        plan: its number.
        folder: name of the writer's folder below ``plans/``.
        shards, rows, bytes: totals.
        next_shard: number of the first shard of the plan after this.
        rewrites: numbers of shards of earlier plans that this plan replaces.
    """

    plan: int
    folder: str
    shards: int
    rows: int
    bytes: int
    next_shard: int
    rewrites: tuple[int, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A shard before it has a place: its number, its key when it replaces another's, its items."""

    items: list[PlanItem]
    number: int
    key: str = ""


def published(root: str) -> list[PlanInfo]:
    """The plans of a run root in order."""
    found: list[PlanInfo] = []
    for number in itertools.count():
        uri = service(root, "plans", f"{number}.json")
        if not storage.exists(uri):
            return found
        data: dict[str, Any] = json.loads(storage.read_bytes(uri))
        found.append(PlanInfo(**{**data, "rewrites": tuple(data["rewrites"])}))
    return found


class _Lost(Exception):
    """Another driver has published this plan's number first."""


def publish(
    root: str,
    table: str,
    listing: Callable[[], Iterable[PlanItem]],
    options: PlanConfig,
    complete: bool = True,
    grouped: bool = False,
    before: Callable[[], None] = lambda: None,
) -> PlanInfo | None:
    """Plan what the plans so far lack, and publish it; None when nothing is new.

    When another driver publishes first, its plan is adopted and only what it lacks is planned. ``before`` is called
    when a plan is about to be published: what must be known of its items is written then.

    Raises:
        ConfigError: two items share a sample id.
    """
    while True:
        plans = published(root)
        try:
            if not plans:
                return _write(root, table, cut(listing(), options, 0, grouped), 0, 0, before)
            next_shard = plans[-1].next_shard
            with _changes(root, plans, listing(), complete) as changes:
                cuts = itertools.chain(
                    (_Cut(items, number, key) for number, key, items in changes.rewrites),
                    cut(changes.new, options, next_shard, grouped),
                )
                return _write(root, table, cuts, len(plans), next_shard, before)
        except _Lost:
            continue


@dataclass(frozen=True, slots=True)
class Preview:
    """What publishing would plan.

    Attributes:
        shards, rows, bytes: that are new.
        rewrites: shards of earlier plans that would be made again.
        planned_rows: rows that are planned already.
        changed, gone: planned inputs that are another version now, or no longer there.
    """

    shards: int
    rows: int
    bytes: int
    rewrites: int
    planned_rows: int
    changed: int = 0
    gone: int = 0


def preview(
    root: str,
    listing: Callable[[], Iterable[PlanItem]],
    options: PlanConfig,
    complete: bool = True,
    grouped: bool = False,
) -> Preview:
    """Like ``publish``, but only counts; writes nothing."""
    plans = published(root)
    if not plans:
        return Preview(*_measure(cut(listing(), options, 0, grouped)), 0, 0)
    planned = latest_shards(root, "", plans).rows
    with _changes(root, plans, listing(), complete) as changes:
        new = _measure(cut(changes.new, options, 0, grouped))
        return Preview(*new, changes.shards, planned, changes.changed, changes.gone)


def _measure(cuts: Iterable[_Cut]) -> tuple[int, int, int]:
    """Shards, rows and bytes."""
    shards = rows = size = 0
    for piece in cuts:
        shards += 1
        rows += sum(i.rows for i in piece.items)
        size += sum(i.bytes for i in piece.items)
    return shards, rows, size


def latest_shards(root: str, table: str, plans: Sequence[PlanInfo]) -> Shards:
    """Every shard in its latest plan, newest plan first."""
    found = Shards.none(root, table)
    for info in reversed(plans):
        found = found.and_older(shards_of(root, table, info))
    return found


def cut(items: Iterable[PlanItem], options: PlanConfig, first: int, grouped: bool = False) -> Iterator[_Cut]:
    """Cut a stream of items into shards of at most ``shard_rows`` rows and about ``shard_bytes`` bytes.

    Ranges of rows of one Parquet file never share a shard with another file's: readers can zip the two. With
    ``grouped``, neighbours of one ``group_id`` stay together, and a shard may hold more for that, up to 512 MB.
    """
    stream = iter(items)
    head = list(itertools.islice(stream, _SMALL))
    limit = options.shard_rows or _rows_per_shard(head, options.usual_rows)
    numbers = itertools.count(first)
    taken: list[PlanItem] = []
    rows = size = 0
    for pieces in _units(itertools.chain(head, stream), limit, grouped):
        more, heavier = sum(p.rows for p in pieces), sum(p.bytes for p in pieces)
        other_file = bool(taken) and not pieces[0].sample_id and pieces[0].uri != taken[0].uri
        if taken and (other_file or rows + more > limit or size + heavier > options.shard_bytes):
            yield _Cut(taken, next(numbers))
            taken, rows, size = [], 0, 0
        taken += pieces
        rows, size = rows + more, size + heavier
    if taken:
        yield _Cut(taken, next(numbers))


def _units(items: Iterable[PlanItem], limit: int, grouped: bool) -> Iterator[list[PlanItem]]:
    """What may not be cut: single items, neighbours of one group, pieces of a range of rows."""
    places = itertools.count()
    for _, together in itertools.groupby(items, lambda i: i.group_id if grouped and i.group_id else next(places)):
        members: list[PlanItem] = []
        size = 0
        for member in together:
            if members and size + member.bytes > _LARGEST_GROUP:
                yield members
                members, size = [], 0
            members.append(member)
            size += member.bytes
        if members[0].sample_id:
            yield members
        else:
            yield from ([piece] for member in members for piece in _pieces(member, limit))


def _rows_per_shard(head: Sequence[PlanItem], usual: int) -> int:
    """The usual ones, but a small input is spread over some shards: several actors have work and progress shows."""
    rows = sum(i.rows for i in head)
    if len(head) == _SMALL:
        return usual
    return min(max(-(-rows // _WANTED_SHARDS), _MIN_SHARD_ROWS), usual)


def _pieces(item: PlanItem, limit: int) -> Iterator[PlanItem]:
    """A range of rows in ranges of at most ``limit`` rows."""
    for start in range(0, item.rows, limit):
        rows = min(limit, item.rows - start)
        share = item.bytes * rows // max(item.rows, 1)
        yield PlanItem("", item.uri, item.etag, share, rows, item.row_start + start, item.detail)


def _key(number: int, items: Sequence[PlanItem]) -> str:
    text = "\n".join(f"{i.uri}\t{i.etag}\t{i.row_start}" for i in items)
    return f"part-{number:08d}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.parquet"


def _write(
    root: str, table: str, cuts: Iterable[_Cut], number: int, next_shard: int, before: Callable[[], None]
) -> PlanInfo | None:
    """Write the parts of a plan, then publish it; None when it is empty.

    Raises:
        _Lost: another driver was first.
    """
    writer = _PlanWriter(service(root, "plans", uuid.uuid4().hex))
    rewrites = []
    try:
        for piece in cuts:
            writer.add(piece)
            if piece.key:
                rewrites.append(piece.number)
            else:
                next_shard = max(next_shard, piece.number + 1)
        if not writer.shards:
            return None
        writer.close()
        _check_unique(writer.duplicates())
        before()
    except BaseException:
        writer.discard()
        raise
    info = PlanInfo(
        plan=number,
        folder=storage.name_of(writer.folder),
        shards=writer.shards,
        rows=writer.rows,
        bytes=writer.bytes,
        next_shard=next_shard,
        rewrites=tuple(rewrites),
    )
    try:
        storage.create(service(root, "plans", f"{number}.json"), json.dumps(asdict(info)).encode())
    except ObjectExists:
        if published(root)[number].folder != info.folder:  # else only the reply was lost
            writer.discard()
            raise _Lost from None
    return info


def _check_unique(duplicates: Collection[str]) -> None:
    if duplicates:
        shown = ", ".join(sorted(duplicates)[:3])
        raise ConfigError(f"{len(duplicates)} sample ids occur twice, for example {shown}", "every id must be unique")


class _IdCheck:
    """Notices sample ids that occur twice: 8 bytes of hash an id, beyond ``_RUN_IDS`` of them on the disk."""

    def __init__(self) -> None:
        self._marks = np.empty(_RUN_IDS, np.uint64)
        self._held = 0
        self._runs: list[int] = []
        self._spill: IO[bytes] | None = None

    def add(self, sample_ids: Sequence[str]) -> None:
        """Look at more ids; empty ones are none."""
        digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in sample_ids if i)
        marks = np.frombuffer(b"".join(digests), np.uint64)
        while len(marks):
            room = _RUN_IDS - self._held
            self._marks[self._held : self._held + room][: len(marks)] = marks[:room]
            self._held += min(room, len(marks))
            marks = marks[room:]
            if self._held == _RUN_IDS:
                self._write_run()

    def _write_run(self) -> None:
        run = np.sort(self._marks[: self._held])
        with storage.on_scratch_disk():
            if self._spill is None:
                self._spill = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
            self._spill.write(run.data)
            self._spill.flush()
        self._runs.append(len(run))
        self._held = 0

    def twice(self) -> NDArray[np.uint64]:
        """Hashes of ids that occur twice."""
        if self._spill is None:
            return _repeated(self._marks[: self._held])
        self._write_run()
        every = np.memmap(self._spill, np.uint64, "r")
        runs = np.split(every, np.cumsum(self._runs)[:-1])
        bounds = np.linspace(0, 2**64 - 1, len(runs) + 1)[1:-1].astype(np.uint64)
        cut_at = [np.concatenate([[0], np.searchsorted(run, bounds), [len(run)]]) for run in runs]
        spans = (
            np.concatenate([r[c[i] : c[i + 1]] for r, c in zip(runs, cut_at, strict=True)]) for i in range(len(runs))
        )
        return np.concatenate([_repeated(span) for span in spans])

    def close(self) -> None:
        """Drop what is on the disk."""
        if self._spill is not None:
            with contextlib.suppress(OSError):  # what is left in its buffer is of no use, and has been complained of
                self._spill.close()


def _repeated(marks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Values that occur more than once."""
    ordered = np.sort(marks)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


class _PlanWriter:
    """Streams items and shards into Parquet files of a plan's own folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.shards = self.rows = self.bytes = 0
        self.ids = _IdCheck()
        self._part = 0
        self._in_part = 0
        self._items: list[tuple[int, PlanItem]] = []
        self._refs: list[tuple[int, str, int, int, int, int, int]] = []
        self._shard_groups: list[pa.Table] = []
        self._item_buffer = storage.buffer()
        self._item_writer = pq.ParquetWriter(self._item_buffer, _ITEMS, compression="zstd")
        self._written: list[str] = []

    def add(self, piece: _Cut) -> None:
        full = self._in_part + len(piece.items) > PART_ROWS or self._item_buffer.tell() > _PART_BYTES
        if self._in_part and full:
            self._roll()
        rows, size = sum(i.rows for i in piece.items), sum(i.bytes for i in piece.items)
        key = piece.key or _key(piece.number, piece.items)
        stop = self._in_part + len(piece.items)
        self._refs.append((piece.number, key, self._part, self._in_part, stop, rows, size))
        for item in piece.items:
            self._items.append((piece.number, item))
        self._in_part += len(piece.items)
        self.shards, self.rows, self.bytes = self.shards + 1, self.rows + rows, self.bytes + size
        if len(self._items) >= _GROUP_ROWS:
            self._flush_items()
        if len(self._refs) >= _GROUP_ROWS:
            self._flush_refs()

    def _flush_items(self) -> None:
        if self._items:
            self.ids.add([i.sample_id for _, i in self._items])
            self._item_writer.write_table(_items_table(self._items), row_group_size=_GROUP_ROWS)
            self._items = []

    def _flush_refs(self) -> None:
        columns = list(zip(*self._refs, strict=True)) if self._refs else [()] * len(INDEX)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)]
        self._shard_groups.append(pa.table(arrays, INDEX))
        self._refs = []

    def _roll(self) -> None:
        self._flush_items()
        self._item_writer.close()
        self._put(f"items-{self._part:08d}.parquet", self._item_buffer.getvalue())
        self._part, self._in_part = self._part + 1, 0
        self._item_buffer = storage.buffer()
        self._item_writer = pq.ParquetWriter(self._item_buffer, _ITEMS, compression="zstd")

    def _put(self, name: str, data: bytes) -> None:
        uri = storage.join(self.folder, name)
        storage.replace(uri, data)
        self._written.append(uri)

    def close(self) -> None:
        self._roll()
        self._flush_refs()
        out = storage.buffer()
        pq.write_table(pa.concat_tables(self._shard_groups), out, compression="zstd")
        self._put(_INDEX, out.getvalue())

    def duplicates(self) -> list[str]:
        """Sample ids that occur twice; the items are read again only where two hashes are equal."""
        marks = self.ids.twice()
        self.ids.close()
        if not len(marks):
            return []
        suspects = {int(m).to_bytes(8, "little") for m in marks}
        found: Counter[str] = Counter()
        for uri in (u for u in self._written if not u.endswith(_INDEX)):
            with storage.open_input(uri) as source:
                for batch in pq.ParquetFile(source).iter_batches(_GROUP_ROWS, columns=["sample_id"]):
                    ids = batch.column("sample_id").to_pylist()
                    found.update(
                        i for i in ids if i and hashlib.blake2b(i.encode(), digest_size=8).digest() in suspects
                    )
        return [i for i, times in found.items() if times > 1]

    def discard(self) -> None:
        """Remove the files of a plan that lost the race, or could not be finished."""
        self.ids.close()
        for uri in self._written:
            storage.delete(uri)
        storage.remove_empty_folder(self.folder)


def _items_table(items: Sequence[tuple[int, PlanItem]]) -> pa.Table:
    columns = [[s for s, _ in items], *([getattr(i, f.name) for _, i in items] for f in _ITEM_FIELDS)]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _ITEMS, strict=True)], _ITEMS)


def shards_of(root: str, table: str, info: PlanInfo) -> Shards:
    """The shards of a plan."""
    with storage.open_input(service(root, "plans", info.folder, _INDEX)) as source:
        index = pq.ParquetFile(source).read(use_threads=False)
    return Shards.of_plan(root, table, info.plan, info.folder, index, info.rewrites)


def items_of(shard: ShardRef) -> list[PlanItem]:
    """The items of a shard, in plan order."""
    found: list[PlanItem] = []
    with storage.open_input(shard.part) as source:
        file = pq.ParquetFile(source)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(shard.start - first, 0), min(shard.stop - first, rows)
            first += rows
            if low < high:
                chunk = file.read_row_group(group, use_threads=False).slice(low, high - low).drop_columns("shard")
                found += [PlanItem(**row) for row in chunk.to_pylist()]  # older plans lack the newest columns
    return found


def changed_file(shards: Iterable[ShardRef]) -> str:
    """The first file that is another version than the one whose rows the shards were to read; empty if there is none.

    Files that are an item each do not count: their rows tell by themselves what was read.
    """
    for part, members in itertools.groupby(shards, key=lambda s: s.part):
        with storage.open_input(part) as source:
            items = pq.read_table(source, columns=["sample_id", "uri", "etag"], use_threads=False)
        for row in pa.concat_tables(items.slice(s.start, s.stop - s.start) for s in members).to_pylist():
            found = None if row["sample_id"] else storage.stat(row["uri"])
            if not row["sample_id"] and (found is None or found.etag != row["etag"]):
                return str(row["uri"])
    return ""


# -- what has changed since the plans so far -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Changes:
    """Streams, to be read once, one after the other.

    Attributes:
        rewrites: shard, its key, its items as they are now; ``shards`` of them.
        new: what no plan has.
        changed, gone: planned inputs.
    """

    rewrites: Iterator[tuple[int, str, list[PlanItem]]]
    new: Iterator[PlanItem]
    shards: int
    changed: int
    gone: int


@contextlib.contextmanager
def _changes(root: str, plans: Sequence[PlanInfo], items: Iterable[PlanItem], complete: bool) -> Iterator[_Changes]:
    """Anti-join the input as it is now with every plan so far, out of core, on (uri, etag)."""
    import duckdb

    with storage.scratch_folder() as scratch, duckdb.connect() as db:
        db.execute(f"SET memory_limit='{_DUCKDB_MEMORY}'; SET threads=2; SET preserve_insertion_order=false")
        db.execute(f"SET temp_directory='{scratch}/spill'")
        listing = Path(scratch) / "listing.parquet"
        _write_listing(listing, items)
        db.execute(f"CREATE VIEW listing AS SELECT file_row_number AS ord, * EXCLUDE (shard) FROM {_rows_of(listing)}")
        planned = ["SELECT 0 AS plan, ord, 0::BIGINT AS shard, * EXCLUDE (ord) FROM listing WHERE false"]
        cuts = ["SELECT 0 AS plan, 0::BIGINT AS shard WHERE false"]
        for plan, path in _local_copies(root, plans, Path(scratch)):
            if path.name.endswith(_INDEX):
                cuts.append(f"SELECT {plan} AS plan, number AS shard FROM {_rows_of(path)}")
            else:
                planned.append(f"SELECT {plan} AS plan, file_row_number AS ord, * FROM {_rows_of(path)}")
        db.execute("CREATE VIEW cuts AS " + " UNION ALL BY NAME ".join(cuts))
        db.execute("CREATE VIEW planned AS " + " UNION ALL BY NAME ".join(planned))
        yield _query_changes(root, plans, db, complete)


def _rows_of(path: Path) -> str:
    """A Parquet file as SQL reads it, with the numbers of its rows."""
    quoted = str(path).replace("'", "''")
    return f"read_parquet('{quoted}', hive_partitioning=false, file_row_number=true)"


def _write_listing(path: Path, items: Iterable[PlanItem]) -> None:
    stream = iter(items)
    with pq.ParquetWriter(path, _ITEMS) as writer:
        while chunk := list(itertools.islice(stream, _GROUP_ROWS)):
            writer.write_table(_items_table([(0, i) for i in chunk]))


# A shard that has lost all its items is in ``cuts`` only: its items of earlier plans are not live.
_LIVE = (
    "CREATE VIEW live AS SELECT p.* FROM planned p JOIN "
    "(SELECT shard, max(plan) AS plan FROM cuts GROUP BY shard) l USING (shard, plan)"
)
_DIFFERS = (
    "(l.etag <> p.etag OR l.sample_id <> p.sample_id OR l.split <> p.split OR l.group_id <> p.group_id "
    "OR (p.sample_id <> '' AND (l.rows <> p.rows OR l.detail <> p.detail)))"
)
_TOUCHED = (
    "CREATE TABLE touched AS SELECT DISTINCT p.shard FROM live p LEFT JOIN listing l USING (uri) "
    f"WHERE {_DIFFERS} OR (l.uri IS NULL AND ?)"
)
_COUNTS = (
    f"SELECT count(DISTINCT uri) FILTER (WHERE {_DIFFERS}), count(DISTINCT uri) FILTER (WHERE l.uri IS NULL AND ?) "
    "FROM live p LEFT JOIN listing l USING (uri)"
)
_TWICE = (
    "SELECT sample_id FROM (SELECT uri, sample_id FROM listing UNION ALL "
    "SELECT uri, sample_id FROM live ANTI JOIN listing USING (uri) WHERE NOT ?) "
    "WHERE sample_id <> '' GROUP BY sample_id HAVING count(*) > 1"
)
_COLUMNS = "sample_id, uri, etag, bytes, rows, row_start, detail, group_id, split"
_NEW = f"SELECT {_COLUMNS} FROM listing ANTI JOIN live USING (uri) ORDER BY ord"
# Each shard of ranges holds a stretch of its file: from its first row to the next shard's, the last one to the end.
_STRETCHES = (
    "CREATE VIEW stretches AS SELECT shard, uri, if(lag(start) OVER file IS NULL, 0, start) AS start, "
    f"coalesce(lead(start) OVER file, {2**62}) AS stop "
    "FROM (SELECT shard, uri, min(row_start) AS start FROM live JOIN touched USING (shard) WHERE sample_id = '' "
    "GROUP BY shard, uri) WINDOW file AS (PARTITION BY uri ORDER BY start)"
)
_REDO_ITEMS = (
    "SELECT shard, l.sample_id, l.uri, l.etag, l.bytes, l.rows, l.row_start, l.detail, l.group_id, l.split "
    "FROM live p JOIN touched USING (shard) LEFT JOIN listing l USING (uri) WHERE p.sample_id <> '' "
    "ORDER BY shard, p.ord"
)
_REDO_RANGES = (
    "SELECT shard, l.sample_id, l.uri, l.etag, l.bytes * (least(l.row_start + l.rows, s.stop) - "
    "greatest(l.row_start, s.start)) // l.rows, least(l.row_start + l.rows, s.stop) - greatest(l.row_start, s.start), "
    "greatest(l.row_start, s.start), l.detail, l.group_id, l.split "
    "FROM stretches s LEFT JOIN listing l ON l.uri = s.uri AND l.row_start < s.stop "
    "AND l.row_start + l.rows > s.start ORDER BY shard, l.row_start"
)


def _query_changes(root: str, plans: Sequence[PlanInfo], db: "duckdb.DuckDBPyConnection", complete: bool) -> _Changes:
    db.execute(_LIVE)
    _check_unique([i for (i,) in db.execute(_TWICE, [complete]).fetchall()])
    db.execute(_TOUCHED, [complete])
    changed, gone = db.execute(_COUNTS, [complete]).fetchall()[0]
    db.execute(_STRETCHES)
    touched = [int(n) for (n,) in db.execute("SELECT shard FROM touched").fetchall()]
    keys = {s.number: s.key for s in latest_shards(root, "", plans).numbered(touched)} if touched else {}
    redo = itertools.chain(_streamed(db, _REDO_ITEMS), _streamed(db, _REDO_RANGES))  # a run has only one of the two
    new = (PlanItem(*row) for row in _streamed(db, _NEW))
    return _Changes(_rewrites(redo, keys), new, len(touched), int(changed), int(gone))


def _streamed(db: "duckdb.DuckDBPyConnection", sql: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a query, a few thousand at a time, over a cursor of their own."""
    with db.cursor() as cursor:
        found = cursor.execute(sql)
        while rows := found.fetchmany(_GROUP_ROWS):
            yield from rows


def _local_copies(root: str, plans: Sequence[PlanInfo], scratch: Path) -> list[tuple[int, Path]]:
    """(plan, local path) of every index and items file; remote ones are copied."""
    found = []
    for info in plans:
        for part in storage.list_files(service(root, "plans", info.folder), (".parquet",)):
            name = storage.name_of(part.uri)
            path = Path(part.uri)
            if not storage.is_local(part.uri):
                path = scratch / f"{info.plan}-{name}"
                path.write_bytes(storage.read_bytes(part.uri))
            found.append((info.plan, path))
    return found


def _rewrites(rows: Iterable[tuple[Any, ...]], keys: dict[int, str]) -> Iterator[tuple[int, str, list[PlanItem]]]:
    """Shards to redo with their items as they are now; a vanished item is a row of nulls."""
    for shard, group in itertools.groupby(rows, key=lambda r: int(r[0])):
        yield shard, keys[shard], [PlanItem(*item) for _, *item in group if item[1] is not None]
