"""Slices of an evaluation: which part of the data an image belongs to, by an SQL expression over its samples row."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from segbatch import schemas, storage, tables
from segbatch.errors import ConfigError

NONE = "none"
"""Label of images for which an expression is null."""

_MOST = 100
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = {
    f.name: (f.name,)
    for f in schemas.SAMPLES
    if f.name not in {"image", "semantic", "panoptic", "label_maps", "instances", "segments", "class_pixels"}
}
_NESTED = {
    "instances": ("id", "category_id", "area", "iscrowd"),
    "segments": ("id", "category_id", "area", "iscrowd"),
    "class_pixels": ("value", "pixels"),
}
_COLUMNS = _PLAIN | {name: tuple(f"{name}.list.element.{leaf}" for leaf in leaves) for name, leaves in _NESTED.items()}

_AREAS = "coalesce(list_transform(instances, lambda o: o.area), list_transform(segments, lambda o: o.area))"

PRESETS: Mapping[str, str] = {
    "objects": """CASE WHEN len(areas) = 0 THEN '0' WHEN len(areas) <= 5 THEN '1-5' WHEN len(areas) <= 20 THEN '6-20'
        WHEN len(areas) > 20 THEN '21+' END""",
    "object-size": """CASE WHEN list_aggregate(areas, 'median') < 1024 THEN 'small'
        WHEN list_aggregate(areas, 'median') < 9216 THEN 'medium'
        WHEN list_aggregate(areas, 'median') >= 9216 THEN 'large' END""",
}
"""Slices by the number of objects in an image, and by the median of their areas (COCO's borders, square pixels).

``areas`` is the list of areas of an image's instances, else of its segments.
"""


@dataclass(frozen=True, slots=True)
class Slicing:
    """One way to cut the data into parts.

    Attributes:
        name: as the user wrote it.
        labels: of every sample by its id.
    """

    name: str
    labels: Mapping[str, str]


def slicings(samples: str, expressions: Sequence[str]) -> list[Slicing]:
    """What every expression says of every sample.

    An expression is a name of ``PRESETS``, a column of samples, an attribute of theirs, or SQL over columns (``areas``
    among them).

    Raises:
        ConfigError: no SQL over these columns, or more than 100 different values.
    """
    return [Slicing(e, _labels(samples, e)) for e in dict.fromkeys(expressions)]


def check(samples: str, expressions: Sequence[str]) -> None:
    """Make sure that the expressions can be used, on the first samples, before hours are spent on counting.

    Raises:
        ConfigError: as ``slicings``, as far as the first samples tell.
    """
    first = tables.parts(tables.find(samples, "samples"))[:1]
    for expression in expressions:
        _of_parts(first, expression)


def _labels(samples: str, expression: str) -> dict[str, str]:
    found = _of_parts(tables.parts(tables.find(samples, "samples")), expression)
    if found and set(found.values()) == {NONE}:
        raise ConfigError(
            f"--slice {expression} says nothing of any sample", f"known: {', '.join([*PRESETS, *_COLUMNS])}"
        )
    return found


def _of_parts(parts: Sequence[storage.ObjectInfo], expression: str) -> dict[str, str]:
    import duckdb

    sql = _sql(expression)
    words = set(_WORD.findall(sql)) | {"sample_id"}
    words |= {"instances", "segments"} if "areas" in words else set()
    columns = [path for name, paths in _COLUMNS.items() if name in words for path in paths]
    areas = f"SELECT *, {_AREAS} AS areas FROM samples" if "areas" in words else "SELECT * FROM samples"
    found: dict[str, str] = {}
    with duckdb.connect(config={"enable_external_access": False, "python_enable_replacements": False}) as db:
        for part in parts:
            filesystem, path = storage.arrow_filesystem(part.uri)
            with filesystem.open_input_file(path) as file:
                db.register("samples", pq.ParquetFile(file).read(columns=columns))
            try:
                rows = db.execute(f"SELECT sample_id, CAST(({sql}\n) AS VARCHAR) FROM ({areas})").fetchall()
            except duckdb.Error as error:
                problem = f"--slice {' '.join(expression.split())}: {str(error).splitlines()[0]}"
                known = ", ".join([*PRESETS, *_COLUMNS, "areas"])
                raise ConfigError(problem, f"give an attribute, or SQL over {known}") from error
            found.update((name, NONE if label is None else label) for name, label in rows)
            if len(set(found.values())) > _MOST:
                problem = f"--slice {expression} has more than {_MOST} values"
                raise ConfigError(problem, "give an expression that puts them into fewer groups")
    return found


def _sql(expression: str) -> str:
    if expression in PRESETS:
        return PRESETS[expression]
    if _WORD.fullmatch(expression) and expression not in _COLUMNS:
        return f"attributes->>'{expression}'"
    return expression
