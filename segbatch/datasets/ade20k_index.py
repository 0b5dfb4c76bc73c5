"""Class names from ``index_ade20k.mat``, the index of the full ADE20K: ``index.objectnames``.

The index is a struct of some 20 fields, two of which count every class in every image: 150 MB and more. So the file is
inflated piece by piece, what is not wanted is skipped, and a damaged file is an error and nothing worse.

Source: "MAT-File Format", R2024a, chapter 1, level 5 (mathworks.com/help/pdf_doc/matlab/matfile_format.pdf);
github.com/CSAILVision/ADE20K, ``notebooks/ade20k_starter.ipynb``: the fields, and that a class is its place from 1.
"""

import struct
import zlib
from collections.abc import Iterator

from segbatch.errors import ConfigError

_HEADER = 128
_ORDERS = {b"IM": "<", b"MI": ">"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
"""By the type that characters are stored in."""

_PIECE = 1 << 20
_MOST = 1 << 24


def class_names(data: bytes, uri: str) -> dict[int, str]:
    """The names by class, from 1; a class without a name has an empty one.

    Args:
        data: the file, a MATLAB 5 file as ``save -v6`` or ``-v7`` writes it.
        uri: named in errors.

    Raises:
        ConfigError: another kind of file, cut off or damaged, or one without such an index.
    """
    try:
        return dict(enumerate(_names(data), 1))
    except (ValueError, struct.error, zlib.error) as error:
        fix = "restore it, or take it away: the names then come from the annotations of the images"
        raise ConfigError(f"{uri} cannot be read: {error}", fix) from error


def _names(data: bytes) -> list[str]:
    order = _ORDERS.get(data[126:_HEADER])
    if order is None or data.startswith(b"MATLAB 7.3"):
        raise ValueError("it is not a MATLAB 5 file")
    file = _Stream(iter([data[_HEADER:]]), order)
    while not file.ended():
        kind, size = file.tag()
        variable = _Stream(_inflated(file.take(size)), order) if kind == _COMPRESSED else file
        if variable is not file:
            kind, size = variable.tag()
        end = variable.at + size
        if kind == _MATRIX and size and variable.matrix() == (_STRUCT, "index"):
            return _object_names(variable)
        if variable is file:
            file.skip(end - file.at)
    raise ValueError("it has no struct called index")


def _inflated(data: bytes) -> Iterator[bytes]:
    decoder = zlib.decompressobj()
    while data and not decoder.eof:
        yield decoder.decompress(data, _PIECE)
        data = decoder.unconsumed_tail


def _object_names(file: "_Stream") -> list[str]:
    """The strings of the field ``objectnames``; ``file`` stands behind the name of the struct."""
    length = struct.unpack(f"{file.order}i", file.element()[1][:4])[0]
    text = file.element()[1]
    fields = [text[i : i + length].split(b"\0")[0] for i in range(0, len(text), max(length, 1))]
    if b"objectnames" not in fields:
        raise ValueError("its index has no objectnames")
    for _ in range(fields.index(b"objectnames")):
        file.skip(file.tag()[1])
    size = file.tag()[1]
    end = file.at + size
    if not size or file.matrix()[0] != _CELL:
        raise ValueError("the objectnames of its index are no cell array")
    names = []
    while file.at < end:
        names.append(_string(file))
    return names


def _string(file: "_Stream") -> str:
    size = file.tag()[1]
    end = file.at + size
    if not size or file.matrix()[0] != _CHAR:  # what is empty may be an array of no numbers
        file.skip(end - file.at)
        return ""
    kind, data = file.element()
    encoding = _ENCODINGS.get(kind, "")
    if not encoding:
        raise ValueError(f"a name is stored as type {kind}")
    return data.decode(
        encoding + {"<": "-le", ">": "-be"}[file.order] if encoding in ("utf-16", "utf-32") else encoding
    )


class _Stream:
    """Data elements one after the other."""

    def __init__(self, pieces: Iterator[bytes], order: str) -> None:
        self._pieces = pieces
        self._held = memoryview(b"")
        self.order = order
        self.at = 0

    def ended(self) -> bool:
        """Whether nothing is left."""
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._held = memoryview(piece)
        return False

    def take(self, size: int) -> bytes:
        """The next bytes."""
        parts = []
        while size:
            if self.ended():
                raise ValueError(f"it is cut short: {size} bytes are missing")
            parts.append(bytes(self._held[:size]))
            self._held = self._held[size:]
            self.at += len(parts[-1])
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Pass over the next bytes; they are not held."""
        if size < 0:
            raise ValueError("it is damaged: an element is longer than what holds it")
        while size:
            size -= len(self.take(min(size, _PIECE)))

    def tag(self) -> tuple[int, int]:
        """Type and size of the next element, which is not a small one."""
        kind, size = struct.unpack(f"{self.order}II", self.take(8))
        return kind, size

    def element(self) -> tuple[int, bytes]:
        """Type and data of the next element; a small one has its size in the upper half of its type."""
        head = self.take(8)
        kind, size = struct.unpack(f"{self.order}II", head)
        if kind >> 16:
            return kind & 0xFFFF, head[4 : 4 + min(kind >> 16, 4)]
        if size > _MOST:
            raise ValueError(f"it is damaged: a name of {size} bytes")
        data = self.take(size)
        self.take(-size % 8)
        return kind, data

    def matrix(self) -> tuple[int, str]:
        """Class and name of the array whose content comes next."""
        flags, _, name = (self.element()[1] for _ in range(3))
        return struct.unpack(f"{self.order}I", flags[:4])[0] & 0xFF, name.decode("latin-1")
