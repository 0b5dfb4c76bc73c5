"""Class tables that come with checkpoints: name lists, side-cars, the PASCAL VOC palette."""

from collections.abc import Sequence

from segbatch import storage
from segbatch.config import Config, parse
from segbatch.errors import ConfigError
from segbatch.records import ClassInfo, ClassTable

Color = tuple[int, int, int]

PASCAL_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""PASCAL VOC's names in the order of its label ids. Source: VOC2012 development kit, VOCinit.m."""

_SAME = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}


class ClassesFile(Config):
    """A class list in TOML.

    Attributes:
        classes: names, in the order of the network's outputs.
        label_ids: the id that is written for each class; 0, 1, 2, ... when empty.
        colors: RGB 0..255 for each class; may be empty.
    """

    classes: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = ()
    colors: tuple[Color, ...] = ()


def voc_color(label_id: int) -> Color:
    """The official PASCAL VOC colour of a label id. Source: VOC2012 development kit, VOClabelcolormap.m.

    >>> voc_color(1), voc_color(3)
    ((128, 0, 0), (128, 128, 0))
    """
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= ((label_id >> (3 * bit + channel)) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


def is_pascal(names: Sequence[str]) -> bool:
    """Whether these are PASCAL VOC's 21 classes, by VOC's or by COCO's spelling."""
    plain = [n.lower().replace(" ", "").replace("_", "") for n in names]
    return tuple(_SAME.get(n, n) for n in plain) == PASCAL_VOC


def class_table(content: ClassesFile, where: str) -> ClassTable:
    """The table of a name list; PASCAL's classes get their official colours.

    Raises:
        ConfigError: lists of different lengths, doubled names or ids.
    """
    names = content.classes
    ids = content.label_ids or tuple(range(len(names)))
    for key, values in (("label_ids", ids), ("colors", content.colors)):
        if values and len(values) != len(names):
            raise ConfigError(f"{where}: {len(values)} {key} for {len(names)} classes", "give one for each class")
    for key, texts in (("class", list(names)), ("label id", [str(i) for i in ids])):
        doubled = sorted({t for t in texts if texts.count(t) > 1})
        if doubled:
            raise ConfigError(f"{where}: {key} {', '.join(doubled)} is there more than once")
    if any(not 0 <= i <= 65535 for i in ids):
        raise ConfigError(f"{where}: label ids must lie in 0..65535, found {min(ids)}..{max(ids)}")
    colors: Sequence[Color | None] = content.colors or [voc_color(i) if is_pascal(names) else None for i in ids]
    return ClassTable(tuple(ClassInfo(i, n, c) for i, n, c in zip(ids, names, colors, strict=True)))


def read_class_table(uri: str) -> ClassTable:
    """A class table from a ``.toml`` file (``ClassesFile``) or a text file with a name a line (``names_in``).

    Raises:
        ConfigError: no classes, or not such a file.
        StorageError: it cannot be read.
    """
    data = storage.read_bytes(storage.resolve(uri))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri} is not a UTF-8 text file: {error.reason} at byte {error.start}") from error
    content = parse(ClassesFile, toml_content(text, uri), uri) if uri.endswith(".toml") else names_in(text)
    if not content.classes:
        raise ConfigError(f"{uri} names no class", "write a class name on each line, or classes = [...] in a .toml")
    return class_table(content, uri)


def names_in(text: str) -> ClassesFile:
    """A class list from a name a line, up to the first empty line: prose may follow behind one."""
    lines = [line.strip() for line in text.strip().splitlines()]
    names = lines[: lines.index("")] if "" in lines else lines
    return ClassesFile(classes=tuple(names))


def toml_content(text: str, where: str) -> dict[str, object]:
    """TOML text as a dictionary.

    Raises:
        ConfigError: it is not TOML, with line and column.
    """
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}") from error
