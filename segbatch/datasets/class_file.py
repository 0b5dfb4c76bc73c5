"""The class table of somebody's own dataset, from ``classes.toml``, ``classes.json`` or ``classes.txt``."""

import json
import tomllib
from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from segbatch import storage
from segbatch.config import Config, parse
from segbatch.errors import ConfigError
from segbatch.records import ClassInfo, ClassTable

FILE_NAMES = ("classes.toml", "classes.json", "classes.txt")

_Channel = Annotated[int, Field(ge=0, le=255)]


class _Class(Config):
    id: int = Field(ge=0, le=65535)
    name: str = Field(min_length=1)
    color: tuple[_Channel, _Channel, _Channel] | None = None
    ignore: bool = False
    isthing: bool = False
    train_id: int | None = None
    supercategory: str = ""


class _ClassFile(Config):
    classes: tuple[_Class, ...] = Field(min_length=1)


def read_class_file(uri: str) -> ClassTable:
    """Read a class file.

    TOML has one ``[[classes]]`` per class, JSON a list of objects (or ``{"classes": [...]}``), with the keys ``id``,
    ``name`` and optionally ``color`` ([r, g, b]), ``ignore``, ``isthing``, ``train_id``, ``supercategory``. A text
    file has one name a line; the first line is the id 0.

    Raises:
        ConfigError: not readable as such, an unknown key, a value out of range, an id, name or colour used twice.
    """
    try:
        text = storage.read_bytes(uri).decode("utf-8")
        found = parse(_ClassFile, _document(text, uri), uri).classes
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{uri} cannot be read: {error}", "see the documentation of image-masks") from error
    for key in ("id", "name", "color"):
        twice = [v for v, n in Counter(getattr(c, key) for c in found).items() if n > 1 and v is not None]
        if twice:
            raise ConfigError(
                f"{uri} uses the {key} {twice[0]!r} for several classes", f"give every class its own {key}"
            )
    return ClassTable(
        tuple(ClassInfo(c.id, c.name, c.color, c.isthing, c.ignore, c.train_id, c.supercategory) for c in found)
    )


def _document(text: str, uri: str) -> dict[str, Any]:
    if uri.endswith(".toml"):
        return tomllib.loads(text)
    if uri.endswith(".json"):
        found = json.loads(text)
        return found if isinstance(found, dict) else {"classes": found}
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise ConfigError(f"line {lines.index('') + 1} of {uri} is empty", "one class name a line, the first is id 0")
    return {"classes": [{"id": i, "name": name} for i, name in enumerate(lines)]}
