"""Shards by the million: columns instead of objects, about 100 bytes a shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from segbatch import storage
from segbatch.records import ShardRef
from segbatch.storage import ObjectInfo
from segbatch.tables import service

INDEX = pa.schema(
    [
        pa.field("number", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("part", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("bytes", pa.int64()),
    ]
)
"""A plan's ``shards.parquet``: one row a shard."""

_COLUMNS = pa.schema([*INDEX, pa.field("plan", pa.int64()), pa.field("rewrite", pa.bool_())])
_CHUNK = 4096
_LISTED = 1 << 16


@dataclass(frozen=True, slots=True)
class Shards:
    """An ordered collection of shards of one run; a ``ShardRef`` exists only while it is looked at.

    Attributes:
        root, table: as in ``ShardRef``.
        folders: name of the folder of every plan.
        columns: ``INDEX`` and, for each shard, its plan and whether it replaces an older result.
        retry: all of them are written and hold bad rows.
    """

    root: str
    table: str
    folders: Mapping[int, str]
    columns: pa.Table
    retry: bool = False

    @classmethod
    def none(cls, root: str, table: str) -> "Shards":
        """No shards."""
        return cls(root, table, {}, _COLUMNS.empty_table())

    @classmethod
    def of_plan(
        cls, root: str, table: str, plan: int, folder: str, index: pa.Table, rewrites: Iterable[int]
    ) -> "Shards":
        """The shards of a plan from its index."""
        is_rewrite = pc.is_in(index.column("number"), value_set=pa.array(rewrites, pa.int64()))
        plans = pa.array(np.full(index.num_rows, plan, np.int64))
        columns = index.append_column(_COLUMNS.field("plan"), plans).append_column(
            _COLUMNS.field("rewrite"), is_rewrite
        )
        return cls(root, table, {plan: folder}, columns)

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def __iter__(self) -> Iterator[ShardRef]:
        parts: dict[tuple[int, int], str] = {}
        for batch in self.columns.to_batches(_CHUNK):
            cells = [c.to_pylist() for c in batch.columns]
            for number, key, part, start, stop, rows, size, plan, is_rewrite in zip(*cells, strict=True):
                if (plan, part) not in parts:
                    name = f"items-{part:08d}.parquet"
                    parts[plan, part] = service(self.root, "plans", self.folders[plan], name)
                mode: Literal["create", "rewrite", "retry"] = "rewrite" if is_rewrite else "create"
                mode = "retry" if self.retry else mode
                uri = parts[plan, part]
                yield ShardRef(self.root, self.table, plan, number, key, uri, start, stop, rows, size, mode)

    def numpy(self, column: str) -> NDArray[Any]:
        """A column as an array of shape (shards,)."""
        return self.columns.column(column).to_numpy()  # type: ignore[no-any-return]

    @property
    def rows(self) -> int:
        """Rows that they have together."""
        return int(pc.sum(self.columns.column("rows")).as_py() or 0)

    @property
    def bytes(self) -> int:
        """Bytes that there are to read for them."""
        return int(pc.sum(self.columns.column("bytes")).as_py() or 0)

    def where(self, mask: NDArray[np.bool_]) -> "Shards":
        """Those for which ``mask``, of shape (shards,), is true."""
        return replace(self, columns=self.columns.filter(pa.array(mask)))

    def numbered(self, numbers: Iterable[int]) -> "Shards":
        """Those with these numbers."""
        return self.where(np.isin(self.numpy("number"), np.fromiter(numbers, np.int64)))

    def and_older(self, older: "Shards") -> "Shards":
        """These, and those of ``older`` plans whose numbers these do not have."""
        lasting = older.where(~np.isin(older.numpy("number"), self.numpy("number")))
        columns = pa.concat_tables([self.columns, lasting.columns])
        return replace(self, folders={**older.folders, **self.folders}, columns=columns)

    def from_place(self, first: int) -> "Shards":
        """The same, those before place ``first`` at the end."""
        return replace(self, columns=pa.concat_tables([self.columns.slice(first), self.columns.slice(0, first)]))

    def same_as(self, other: "Shards") -> bool:
        """Whether both are the same shards of the same plans in the same order."""
        names = ["number", "plan"]
        return bool(self.columns.select(names).equals(other.columns.select(names)))


class Present:
    """The part files of a table folder: name, tag and size, as columns."""

    def __init__(self, files: Iterable[ObjectInfo]) -> None:
        names: list[pa.Array] = []
        tags: list[pa.Array] = []
        sizes: list[NDArray[np.int64]] = []
        for chunk in _chunks(files):
            names.append(pa.array([storage.name_of(f.uri) for f in chunk], pa.string()))
            tags.append(pa.array([f.etag for f in chunk], pa.string()))
            sizes.append(np.array([f.size for f in chunk], np.int64))
        self.names: pa.Array = pa.chunked_array(names, pa.string()).combine_chunks()
        self.etags: pa.Array = pa.chunked_array(tags, pa.string()).combine_chunks()
        self.sizes = np.concatenate([np.empty(0, np.int64), *sizes])

    def __len__(self) -> int:
        return len(self.sizes)

    def places(self, shards: Shards) -> NDArray[np.int64]:
        """Where each shard's result stands here; -1 where it is not there; of shape (shards,)."""
        if not len(self):
            return np.full(len(shards), -1, np.int64)
        found = pc.index_in(shards.columns.column("key"), value_set=self.names)
        return pc.fill_null(found, -1).to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def tags(self, places: NDArray[np.int64]) -> list[str | None]:
        """The tag at each place; None at -1."""
        return self.etags.take(pa.array(places, mask=places < 0)).to_pylist()  # type: ignore[no-any-return]

    def infos(self, shards: Sequence[tuple[ShardRef, int]]) -> list[ObjectInfo]:
        """Tag and size of the results of shards, each with its place."""
        places = np.array([place for _, place in shards], np.int64)
        sizes = self.sizes[places].tolist()
        tags = self.tags(places)
        return [ObjectInfo(s.uri, tag or "", size) for (s, _), tag, size in zip(shards, tags, sizes, strict=True)]


def _chunks(files: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    chunk: list[ObjectInfo] = []
    for file in files:
        chunk.append(file)
        if len(chunk) >= _LISTED:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
