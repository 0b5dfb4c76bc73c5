"""Official class tables, one JSON file each: ``name``, ``source`` (repository, file, commit), ``licence``, ``classes``.

``classes`` is in the form of ``ClassTable.to_json``, in the official order, void classes included. ``source`` also says
what the ids mean in the dataset's label maps, and which facts are not official.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from segbatch.config import nearest
from segbatch.errors import ConfigError
from segbatch.records import ClassTable

_SUFFIX = ".json"


def names() -> tuple[str, ...]:
    """Every table, in alphabetical order."""
    files = (f.name for f in resources.files(__name__).iterdir())
    return tuple(sorted(f.removesuffix(_SUFFIX) for f in files if f.endswith(_SUFFIX)))


@cache
def load(name: str) -> ClassTable:
    """The class table of that name.

    Raises:
        ConfigError: no such table, with the known ones and the nearest.
    """
    return ClassTable.from_json(_document(name)["classes"])


@cache
def from_459() -> Mapping[int, int]:
    """Label ids of ``pascal-context-59`` and ``-60`` by those of ``pascal-context-459``; all other ids become 0."""
    ids: dict[str, int] = _document("pascal-context-59")["from_459"]
    return MappingProxyType({int(old): new for old, new in ids.items()})


def _document(name: str) -> dict[str, Any]:
    if name not in names():
        known = ", ".join(names())
        raise ConfigError(f"unknown class table {name!r}{nearest(name, names())}", f"known: {known}")
    document: dict[str, Any] = json.loads((resources.files(__name__) / f"{name}{_SUFFIX}").read_text("utf-8"))
    return document
