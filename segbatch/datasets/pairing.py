"""Photos and label files that belong together by their file stems, and items that nothing can be read of."""

import json
from collections.abc import Iterable

from segbatch.datasets import reading
from segbatch.errors import DataError
from segbatch.records import PlanItem
from segbatch.storage import ObjectInfo

DUPLICATE = "duplicate-id"
"""Status of a file whose sample id another file has already."""

_REFUSED = "refused"


def by_stem(files: Iterable[tuple[str, ObjectInfo]]) -> tuple[dict[str, ObjectInfo], list[tuple[str, ObjectInfo]]]:
    """Files by their path without the suffix, in listing order; of each stem the first, then those that came later."""
    first: dict[str, ObjectInfo] = {}
    later = []
    for path, info in files:
        stem = path.rsplit(".", 1)[0]
        if stem in first:
            later.append((path, info))
        else:
            first[stem] = info
    return first, later


def refused(sample_id: str, uri: str, etag: str, size: int, error: DataError, split: str = "") -> PlanItem:
    """An item whose only row says what is wrong: ``check`` raises ``error``. It is its own group."""
    detail = json.dumps({_REFUSED: error.args})
    return PlanItem(sample_id, uri, etag, size, detail=detail, group_id=sample_id, split=split)


def twin(sample_id: str, info: ObjectInfo, taken: str, split: str = "") -> PlanItem:
    """The item of a file whose id another one has; ``sample_id`` is its path, ``taken`` the file that keeps the id."""
    error = DataError(f"{info.uri} has the sample id of {taken}", "rename or remove one of them", DUPLICATE, info.uri)
    return refused(sample_id, info.uri, info.etag, info.size, error, split)


def check(item: PlanItem) -> None:
    """Do nothing for an item that can be read.

    Raises:
        DataError: what ``refused`` was given.
    """
    found = reading.detail_of(item).get(_REFUSED)
    if found is not None:
        raise DataError(*found)
