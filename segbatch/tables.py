"""Parquet tables in a run root: ``ROOT/<table>/part-*.parquet``, service files in ``ROOT/.segbatch/``."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from segbatch import schemas, storage
from segbatch.errors import ConfigError, ObjectMissing, SchemaError
from segbatch.records import OK, ClassTable
from segbatch.storage import ObjectInfo

SERVICE = ".segbatch"
PREFIX = "part-"
SUFFIX = ".parquet"
CHECKSUMS_KEY = "segbatch.checksums"
"""Footer key of part files whose pages carry checksums."""


def service(root: str, *parts: str) -> str:
    """URI of a service file of a run root."""
    return storage.join(root, SERVICE, *parts)


def find(root_or_folder: str, table: str) -> str:
    """URI of the folder that holds ``table``, given the run root or that folder itself.

    Raises:
        ConfigError: there is no such table.
    """
    root = storage.resolve(root_or_folder)
    if storage.name_of(root) == table and not storage.is_folder(storage.join(root, table)):
        folder = root
    else:
        folder = storage.join(root, table)
    if not storage.is_folder(folder):
        raise ConfigError(f"{root_or_folder} has no {table} table", f"expected {table}/part-*.parquet there")
    return folder


def has(root_or_folder: str, table: str) -> bool:
    """Whether ``find`` would find the table."""
    try:
        find(root_or_folder, table)
    except ConfigError:
        return False
    return True


def root_of(root_or_folder: str, table: str) -> str:
    """URI of the run root that ``table`` lies in."""
    return find(root_or_folder, table).rsplit("/", 1)[0]


def list_parts(folder: str) -> Iterator[ObjectInfo]:
    """The part files of a table folder, as a stream."""
    found = storage.list_files(folder, (SUFFIX,), recursive=False)
    return (p for p in found if storage.name_of(p.uri).startswith(PREFIX))


def parts(folder: str) -> list[ObjectInfo]:
    """The part files of a table folder, by name."""
    return sorted(list_parts(folder), key=lambda p: p.uri)


def open_part(uri: str, table: str, check: bool = False) -> pq.ParquetFile:
    """Open a part file and check what it is; the caller closes it.

    With ``check``, reading compares every page with its checksum; pages of older files have none.

    Raises:
        SchemaError: not Parquet, another table, or another major version.
    """
    source = storage.open_input(uri)
    try:
        with _readable(uri):
            file = pq.ParquetFile(source, page_checksum_verification=check)
            schemas.check_version(table, file.schema_arrow, uri)
    except SchemaError:
        source.close()
        raise
    return file


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    """What the Parquet reader says of a damaged footer names the file."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(uri, error) from error
    except OSError as error:
        if error.errno:  # the disk's
            raise
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> SchemaError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return SchemaError(
        f"{uri} is not a readable Parquet file: {said}", "delete it and run the command that wrote it again"
    )


def batches(
    uri: str,
    table: str,
    columns: Sequence[str] | None = None,
    start: int = 0,
    stop: int | None = None,
    batch_rows: int = 64,
    check: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Rows ``[start, stop)`` of one part, by row group and then at most ``batch_rows`` at a time.

    Columns that the file does not have yet (an older minor version of the schema) come as nulls. ``check``: see
    ``open_part``.

    Raises:
        SchemaError: see ``open_part``.
    """
    with open_part(uri, table, check) as file:
        stop = file.metadata.num_rows if stop is None else stop
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, rows)
            first += rows
            if low >= high:
                continue
            for batch in _slices(file, group, columns, (low, high), batch_rows):
                yield with_new_columns(batch, table, columns)


def _slices(
    file: pq.ParquetFile, group: int, columns: Sequence[str] | None, bounds: tuple[int, int], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Rows ``bounds`` of one row group."""
    low, high = bounds
    position = 0
    names = list(columns) if columns is not None else None
    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=names, use_threads=False):
        left, right = max(low - position, 0), min(high - position, batch.num_rows)
        position += batch.num_rows
        if left < right:
            yield batch.slice(left, right - left)
        if position >= high:
            return


Batch = TypeVar("Batch", pa.RecordBatch, pa.Table)


def with_new_columns(batch: Batch, table: str, columns: Sequence[str] | None = None) -> Batch:
    """Rows with nulls in those of ``columns`` (all when None) that their older file does not have yet."""
    schema = schemas.TABLES[table]
    wanted = schema.names if columns is None else [c for c in columns if c in schema.names]
    for name in (w for w in wanted if w not in batch.schema.names):
        batch = batch.append_column(schema.field(name), pa.nulls(batch.num_rows, schema.field(name).type))
    return batch


def scan(root_or_folder: str, table: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All rows of a table in part order, as a stream."""
    for part in parts(find(root_or_folder, table)):
        yield from batches(part.uri, table, columns)


def count_rows(uri: str, table: str) -> int:
    """Rows of a part file, from its footer."""
    with open_part(uri, table) as file:
        return int(file.metadata.num_rows)


def footer(uri: str) -> dict[str, str]:
    """The key-value metadata of a part file's footer.

    Raises:
        ObjectMissing: the file is not there.
        SchemaError: it is not Parquet.
    """
    with storage.open_input(uri) as source, _readable(uri):
        metadata = pq.read_metadata(source).metadata or {}
        return {k.decode(): v.decode() for k, v in metadata.items() if k != b"ARROW:schema"}


def write_dataset_info(root: str, info: dict[str, Any]) -> None:
    """Write ``.segbatch/dataset.json``: name, source, splits, class table."""
    storage.replace(service(root, "dataset.json"), json.dumps(info, indent=1, ensure_ascii=False).encode())


def dataset_info(root: str) -> dict[str, Any]:
    """Read ``.segbatch/dataset.json``.

    Raises:
        ConfigError: the root has none.
    """
    try:
        info: dict[str, Any] = json.loads(storage.read_bytes(service(root, "dataset.json")))
    except ObjectMissing as error:
        raise ConfigError(
            f"{root} has no {SERVICE}/dataset.json with its classes", "ingest the dataset first"
        ) from error
    return info


def class_table(root: str) -> ClassTable:
    """The class table of a run root."""
    return ClassTable.from_json(dataset_info(root).get("classes", []))


class PartWriter:
    """Puts one part file together, in memory, with the table's schema, encodings and bounded row groups."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.rows = 0
        self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.issues: Counter[str] = Counter()
        self._buffer = pa.BufferOutputStream()
        self._schema = schemas.stamped(table)
        self._has_status = "status" in self._schema.names
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        options: dict[str, Any] = schemas.parquet_options(table)
        self._writer = pq.ParquetWriter(self._buffer, self._schema, **options)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows; columns are taken by name and must have the table's types."""
        if batch.schema.names != self._schema.names:
            raise SchemaError(f"{self.table}: columns {batch.schema.names} instead of {self._schema.names}")
        self.rows += batch.num_rows
        if self._has_status:
            self._count(batch)
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        self._pending_bytes += batch.nbytes
        if self._pending_rows >= schemas.ROW_GROUP_ROWS or self._pending_bytes >= schemas.ROW_GROUP_BYTES:
            self._flush()

    def _count(self, batch: pa.RecordBatch) -> None:
        status = batch.column("status")
        for entry in pc.value_counts(status).to_pylist():
            if entry["values"] != OK:
                self.bad += entry["counts"]
                self.reasons[entry["values"]] += entry["counts"]
        if "issues" in batch.schema.names:
            good = batch.column("issues").filter(pc.equal(status, OK))
            codes = pc.struct_field(pc.list_flatten(good), "code")
            self.issues.update({e["values"]: e["counts"] for e in pc.value_counts(codes).to_pylist()})

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches([b.cast(self._schema) for b in self._pending], self._schema)
            self._writer.write_table(table, row_group_size=schemas.ROW_GROUP_ROWS)
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def finish(self, footer: dict[str, str]) -> bytes:
        """Close the file with ``footer`` as key-value metadata and return its bytes."""
        self._flush()
        self._writer.add_key_value_metadata({CHECKSUMS_KEY: "crc32", **footer})
        self._writer.close()
        return self._buffer.getvalue().to_pybytes()  # type: ignore[no-any-return]


def write_table(root: str, table: str, data: pa.Table) -> str:
    """Write a whole small table as its only part; returns its URI. Readers see the old table or the new one."""
    folder = storage.join(root, table)
    uri = storage.join(folder, f"{PREFIX}{0:08d}-{'0' * 12}{SUFFIX}")
    writer = PartWriter(table)
    for batch in data.cast(schemas.TABLES[table]).to_batches(max_chunksize=schemas.ROW_GROUP_ROWS):
        writer.write(batch)
    storage.replace(uri, writer.finish({}))
    for part in parts(folder):
        if part.uri != uri:
            storage.delete(part.uri)
    return uri
