"""What formats with a file per image share: names that follow from sample ids, and finding them again."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from segbatch.datasets import reading
from segbatch.datasets.reading import IMAGE_SUFFIXES
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats.base import Labels, SampleRef
from segbatch.records import PlanItem
from segbatch.storage import ObjectInfo

MISSING_PREDICTION = "missing-prediction"
_SHOWN = 3


def stem_of(sample_id: str) -> str:
    """A sample id without the suffix of a photo's file name."""
    return sample_id.rsplit(".", 1)[0] if sample_id.lower().endswith(IMAGE_SUFFIXES) else sample_id


def label_path(sample_id: str, suffix: str) -> str:
    """Relative path of a sample's own file: its id without the photo's suffix, and ``suffix``."""
    return f"{stem_of(sample_id)}{suffix}"


def file_name(row: Labels | SampleRef, suffix: str) -> str:
    """The photo's file name with another suffix."""
    return f"{stem_of(row.image_uri.rstrip('/').rsplit('/', 1)[-1])}{suffix}"


def item_of(sample: SampleRef, uri: str, etag: str, size: int, detail: Mapping[str, Any] | None = None) -> PlanItem:
    """The plan item of a sample's prediction; ``sample`` is kept in its detail for the row that comes of it."""
    kept = {"image_uri": sample.image_uri, "etag": sample.etag, "height": sample.height, "width": sample.width}
    return PlanItem(
        sample_id=sample.sample_id,
        uri=uri,
        etag=f"{sample.etag}+{etag}",
        bytes=size,
        rows=sample.rows,
        detail=json.dumps({**(detail or {}), "sample": kept}),
        group_id=sample.group_id,
        split=sample.split,
    )


def size_of(item: PlanItem) -> tuple[int, int]:
    """Height and width that the prediction has to have."""
    sample = reading.detail_of(item)["sample"]
    return int(sample["height"]), int(sample["width"])


def match_files(
    files: Tree, samples: Iterable[SampleRef], path_of: Callable[[SampleRef], str], suffixes: tuple[str, ...]
) -> Iterator[PlanItem]:
    """One item per sample: the file at ``path_of(sample)``, or one of that name in another folder.

    Args:
        files: where to look.
        samples: in the order of the items.
        path_of: the path by the format's rules.
        suffixes: of the files that are predictions.

    Raises:
        ConfigError: no such file at all; files that belong to no sample (after all samples were seen), named.
    """
    found = dict(files.files("", suffixes))
    if not found:
        raise ConfigError(f"{files.source} holds no file that ends in {' '.join(suffixes)}", "check the format")
    by_name = _unique_names(found)
    used: set[str] = set()
    for sample in samples:
        path = path_of(sample)
        info = found.get(path) or by_name.get(path.rsplit("/", 1)[-1])
        if info is not None:
            used.add(info.uri)
        uri = info.uri if info else files.uri(path)
        yield item_of(sample, uri, info.etag if info else reading.MISSING, info.size if info else 0)
    refuse_unknown([i.uri for i in found.values() if i.uri not in used], files.source)


def _unique_names(found: Mapping[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Files by their name, without those whose name occurs in several folders."""
    by_name: dict[str, ObjectInfo | None] = {}
    for path, info in found.items():
        name = path.rsplit("/", 1)[-1]
        by_name[name] = None if name in by_name else info
    return {name: info for name, info in by_name.items() if info is not None}


def refuse_unknown(names: list[str], source: str) -> None:
    """Refuse predictions that no sample is known for.

    Raises:
        ConfigError: naming the first ones.
    """
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise ConfigError(
            f"{source} has {len(names)} predictions for images that are not among the samples: {shown}",
            "import against the samples they were made for",
        )


def missing(item: PlanItem) -> DataError:
    """The error of a sample without a prediction."""
    return DataError(f"no prediction at {item.uri}", "add the file", MISSING_PREDICTION, item.uri)


def safe_name(text: str) -> str:
    """``text`` as one component of a path: other characters than letters, digits and ``._-`` become ``_``."""
    return re.sub(r"[^\w.\-]", "_", text).lstrip(".") or "_"
