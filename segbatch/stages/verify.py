"""Verify: read every part file of a run root again and say what is wrong with which.

Pages are compared with their checksums, footers and counts with the plan, label maps with their image's size, label ids
with the class table; sample ids are unique over all files. Files are read in parallel, a row group at a time.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from segbatch import schemas, storage, tables
from segbatch.errors import ObjectMissing, SchemaError, StorageError
from segbatch.records import OK, ShardRef
from segbatch.runs import Run
from segbatch.shards import Present
from segbatch.storage import ObjectInfo

_BATCH_ROWS = 64
_IDS_AT_ONCE = 1 << 17
_SHOWN = 3
_IDS = 1 << 16
_DUCKDB_MEMORY = "400MB"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a run root.

    Attributes:
        code: ``missing``, ``stray``, ``unreadable``, ``footer``, ``rows``, ``counts``, ``runs``, ``classes`` or
            ``duplicates``.
        uri: the file, or the run root.
        said: what is wrong, with numbers.
        fix: what to do.
    """

    code: str
    uri: str
    said: str
    fix: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found.

    Attributes:
        root: the run root.
        files, rows, bytes: that were read, of every table.
        without_checksums: files of an older segbatch, whose pages have none.
        problems: what is wrong, file by file.
    """

    root: str
    files: int
    rows: int
    bytes: int
    without_checksums: int
    problems: tuple[Problem, ...]

    @property
    def is_good(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


@dataclass(slots=True)
class _Part:
    """What was found in one file."""

    info: ObjectInfo
    ids: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    rows: int = 0
    has_checksums: bool = True
    problems: list[Problem] = field(default_factory=list)

    def complain(self, code: str, said: str, fix: str) -> None:
        """Note a problem; of each kind one a file."""
        if all(p.code != code for p in self.problems):
            self.problems.append(Problem(code, self.info.uri, said, fix))


def verify(run: Run, threads: int, advance: Callable[[int, int], None] = lambda rows, bad: None) -> Verified:
    """Look at every file of a run.

    Args:
        run: whose plan says what must be there.
        threads: files at a time; each holds a row group in memory (at most 100 rows or 64 MB, more when unpacked).
        advance: told of rows looked at, and of files with problems, as it goes on.
    """
    folder = storage.join(run.root, run.table)
    present = Present(tables.list_parts(folder))  # before the plans, one of which has each of these files
    shards = run.shards()
    places = present.places(shards)
    problems = [*_missing(run), *_strays(folder, present, places)]
    written = shards.where(places >= 0)
    classes = _known_ids(run.root) if run.table == "masks" else None
    look = functools.partial(_planned_part, fix=_again(run.root), table=run.table, classes=classes)
    pairs = zip(written, places[places >= 0].tolist(), strict=True)
    files = rows = size = old = broken = 0
    with _Ids() as ids, ThreadPoolExecutor(threads) as pool:
        planned = _window(pool, look, ((s, i) for s, i in _with_infos(pairs, present)), 4 * threads)
        others = _window(pool, _other_part, _other_parts(run), 4 * threads)
        for part in itertools.chain(planned, others):
            files, rows, size = files + 1, rows + part.rows, size + part.info.size
            old += not part.has_checksums
            broken += bool(part.problems)
            problems += part.problems
            ids.add(part.info.uri, part.ids)
            advance(rows, broken)
        problems += ids.duplicates(run.root)
    return Verified(run.root, files, rows, size, old, tuple(problems))


def _again(root: str) -> str:
    return f"delete it and run the command that made {root} again"


def _missing(run: Run) -> Iterator[Problem]:
    lacking = run.lacking()
    if lacking:
        shown = ", ".join(str(s.number) for s in itertools.islice(lacking, _SHOWN))
        said = f"{len(lacking)} planned shards with {lacking.rows} rows are not there, for example {shown}"
        yield Problem("missing", run.root, said, "run the same command again")


def _strays(folder: str, present: Present, places: NDArray[np.int64]) -> Iterator[Problem]:
    is_planned = np.zeros(len(present), bool)
    is_planned[places[places >= 0]] = True
    for name in present.names.filter(pa.array(~is_planned)).to_pylist():
        yield Problem("stray", f"{folder}/{name}", "no plan has this file", "move it away: readers take it for rows")


def _with_infos(pairs: Iterator[tuple[ShardRef, int]], present: Present) -> Iterator[tuple[ShardRef, ObjectInfo]]:
    while chunk := list(itertools.islice(pairs, 4096)):
        yield from zip((s for s, _ in chunk), present.infos(chunk), strict=True)


def _window(pool: ThreadPoolExecutor, work: Callable[..., _Part], todo: Iterator[Any], ahead: int) -> Iterator[_Part]:
    """``work`` over ``todo`` in order, a few ahead."""
    while chunk := list(itertools.islice(todo, ahead)):
        yield from pool.map(lambda arguments: work(*arguments), chunk)


def _other_parts(run: Run) -> Iterator[tuple[ObjectInfo, str]]:
    """Files of tables that no plan knows: those that an evaluation ends with."""
    for table in (t for t in schemas.TABLES if t != run.table):
        yield from ((info, table) for info in tables.list_parts(storage.join(run.root, table)))


def _other_part(info: ObjectInfo, table: str) -> _Part:
    part = _Part(info)
    for _ in _batches(part, table, "run the command that made it again"):
        continue
    return part


def _planned_part(shard: ShardRef, info: ObjectInfo, fix: str, table: str, classes: NDArray[np.bool_] | None) -> _Part:
    part = _Part(info)
    bad, ids = 0, []
    footer: dict[str, str] = {}
    for batch in _batches(part, table, fix, footer):
        ids.append(batch.column("sample_id"))
        bad += pc.sum(pc.not_equal(batch.column("status"), OK)).as_py() or 0
        _check_maps(part, batch, fix)
        if classes is not None:
            _check_classes(part, batch, classes, fix)
    part.ids = pa.concat_arrays(ids) if ids else part.ids
    if any(p.code == "unreadable" for p in part.problems):
        return part
    if footer.get("segbatch.shard") != str(shard.number):
        part.complain("footer", f"it is the result of shard {footer.get('segbatch.shard')}, not {shard.number}", fix)
    elif part.rows != shard.rows:
        part.complain("rows", f"{part.rows} rows, {shard.rows} were planned", fix)
    elif (footer.get("segbatch.rows"), footer.get("segbatch.bad")) != (str(part.rows), str(bad)):
        said = f"{part.rows} rows with {bad} bad ones, its footer says {footer.get('segbatch.rows')} with"
        part.complain("counts", f"{said} {footer.get('segbatch.bad')}", fix)
    return part


def _batches(part: _Part, table: str, fix: str, footer: dict[str, str] | None = None) -> Iterator[pa.RecordBatch]:
    """All rows of a file with all columns, its pages compared with their checksums."""
    try:
        with tables.open_part(part.info.uri, table, check=True) as file:
            found = _footer(file)
            if strange := _strange_columns(file.schema_arrow, table):
                part.complain("schema", f"its columns are not those of {table}: {strange}", fix)
                return
            part.has_checksums = tables.CHECKSUMS_KEY in found
            if footer is not None:
                footer.update(found)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
                    part.rows += batch.num_rows
                    yield batch
    except ObjectMissing:
        part.complain("unreadable", "it was listed but is not there any more", "look again")
    except StorageError:
        raise
    except SchemaError as error:
        part.complain("unreadable", error.problem.replace(f"{part.info.uri} ", ""), error.fix or fix)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        part.complain("unreadable", f"its content is damaged: {str(error).splitlines()[0]}", fix)


def _footer(file: pq.ParquetFile) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items() if k != b"ARROW:schema"}


def _strange_columns(found: pa.Schema, table: str) -> str:
    """What is wrong with the columns of a file; empty when nothing is. Files of earlier versions lack some.

    A footer has no checksum: a damaged name would be a column that nobody reads.
    """
    wanted = schemas.TABLES[table]
    names = wanted.names
    if schemas.version_of(found) == schemas.SCHEMA_VERSION:
        is_good = found.equals(wanted)
    else:
        names = [name for name in names if name in found.names]
        is_good = found.names == names
    return "" if is_good else ", ".join(sorted(set(found.names) ^ set(names))) or "their types"


# -- content ---------------------------------------------------------------------------------------------------------


def _check_maps(part: _Part, batch: pa.RecordBatch, fix: str) -> None:
    """The runs of every label map, and the pixels of its classes, add up to height x width."""
    names = set(batch.schema.names)
    if not {"height", "width"} <= names:
        return
    pixels = _integers(batch.column("height")) * _integers(batch.column("width"))
    sums = [
        (name, *_sums(batch.column(name), leaf))
        for name, leaf in (("semantic", "length"), ("panoptic", "length"), ("class_pixels", "pixels"))
        if name in names
    ]
    if "label_maps" in names:
        sums.append(("label_maps", *_nested_sums(batch.column("label_maps"))))
    for name, rows, found in sums:
        wrong = np.flatnonzero(found != pixels[rows])
        if len(wrong):
            row = int(rows[wrong[0]])
            sample = batch.column("sample_id")[row].as_py()
            said = f"{sample}: {name} covers {int(found[wrong[0]])} pixels, the image has {int(pixels[row])}"
            part.complain("runs", said, fix)


def _integers(column: pa.Array) -> NDArray[np.int64]:
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def _list_sums(lists: pa.ListArray, leaf: str) -> NDArray[np.int64]:
    """Sum of a leaf over each list; of shape (lists,)."""
    offsets = lists.offsets.to_numpy()
    values = lists.values.field(lists.type.value_type.get_field_index(leaf)).to_numpy()
    added = np.concatenate([[0], np.cumsum(values[offsets[0] : offsets[-1]], dtype=np.int64)])
    ends = offsets - offsets[0]
    return added[ends[1:]] - added[ends[:-1]]  # type: ignore[no-any-return]


def _sums(column: pa.ListArray, leaf: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that have a list, and the sum of a leaf over each."""
    rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    return rows, _list_sums(column, leaf)[rows]


def _nested_sums(column: pa.ListArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row of each further label map, and the pixels that it covers."""
    offsets = column.offsets.to_numpy()
    maps = column.values.field(column.type.value_type.get_field_index("runs"))
    rows = np.repeat(np.arange(len(column)), np.diff(offsets))
    return rows, _list_sums(maps, "length")[offsets[0] : offsets[-1]]


def _known_ids(root: str) -> NDArray[np.bool_] | None:
    """By label id, whether the class table has it; None where there is none."""
    if not storage.exists(tables.service(root, "dataset.json")):
        return None
    ids = [c.label_id for c in tables.class_table(root).classes]
    known = np.zeros(_IDS, bool)
    known[[i for i in ids if 0 <= i < _IDS]] = True
    return known if ids else None


def _check_classes(part: _Part, batch: pa.RecordBatch, known: NDArray[np.bool_], fix: str) -> None:
    """Every label id of a prediction is in the class table."""
    for name, leaf in (("semantic", "value"), ("instances", "category_id"), ("segments", "category_id")):
        if name not in batch.schema.names:
            continue
        column = batch.column(name)
        offsets = column.offsets.to_numpy()
        ids = column.values.field(column.type.value_type.get_field_index(leaf)).to_numpy()
        ids = ids[offsets[0] : offsets[-1]].astype(np.int64)
        strange = (ids < 0) | (ids >= _IDS)
        strange[~strange] = ~known[ids[~strange]]
        if strange.any():
            first = int(np.flatnonzero(strange)[0])
            row = int(np.searchsorted(offsets - offsets[0], first, side="right")) - 1
            said = f"{batch.column('sample_id')[row].as_py()}: {name} holds label {ids[first]}, which is no class"
            part.complain("classes", said, fix)


# -- sample ids ------------------------------------------------------------------------------------------------------


class _Ids:
    """Sample ids of all files, on the disk; a context manager."""

    def __init__(self) -> None:
        import duckdb

        self._scratch = contextlib.ExitStack()
        folder = self._scratch.enter_context(storage.scratch_folder())
        self._db: duckdb.DuckDBPyConnection = duckdb.connect(str(Path(folder) / "ids.db"))
        self._db.execute(f"SET memory_limit='{_DUCKDB_MEMORY}'; SET threads=2; SET preserve_insertion_order=false")
        self._db.execute("CREATE TABLE ids (file BIGINT, sample_id VARCHAR)")
        self._names: list[str] = []
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "_Ids":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        self._db.close()
        return self._scratch.__exit__(*error)

    def add(self, uri: str, ids: pa.Array) -> None:
        """The ids of one file."""
        files = pa.array(np.full(len(ids), len(self._names), np.int64))
        self._names.append(storage.name_of(uri))
        self._waiting.append(pa.table({"file": files, "sample_id": ids}))
        if sum(t.num_rows for t in self._waiting) >= _IDS_AT_ONCE:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._db.register("more", pa.concat_tables(self._waiting))
            self._db.execute("INSERT INTO ids SELECT file, sample_id FROM more")
            self._db.unregister("more")
        self._waiting = []

    def duplicates(self, root: str) -> Iterator[Problem]:
        """One problem for all ids that occur more than once."""
        self._write()
        twice = "SELECT sample_id, min(file) AS f, max(file) AS l FROM ids GROUP BY sample_id HAVING count(*) > 1"
        count, *_ = self._db.execute(f"SELECT count(*) FROM ({twice})").fetchall()[0]
        if count:
            rows: Sequence[tuple[str, int, int]] = self._db.execute(f"{twice} ORDER BY 1 LIMIT {_SHOWN}").fetchall()
            shown = "; ".join(f"{i} in {self._names[f]} and {self._names[g]}" for i, f, g in rows)
            yield Problem("duplicates", root, f"{count} sample ids occur twice: {shown}", "move the wrong file away")
