"""LiTS submissions: a NIfTI label volume per CT, ``test-segmentation-N.nii`` for ``test-volume-N``.

For ``volume-N`` of the training set the name is ``segmentation-N.nii``, that of its ground truth, so that the official
scoring finds predictions beside references by name. Labels are uint8 0, 1 (liver) and 2 (lesion); shape, affine and
all else of the header are the CT's.

Source: competitions.codalab.org/competitions/17094; github.com/PatrickChrist/lits-challenge-scoring,
``program/evaluate.py`` (commit 090307d): files of the same name, ``.nii``, of the same shape.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import volume
from segbatch.codecs.volume import Header
from segbatch.datasets import lits, reading
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.files import item_of, missing, refuse_unknown, size_of
from segbatch.records import ClassTable, PlanItem, Prediction, Task
from segbatch.storage import ObjectInfo

_LABEL_IDS = {0, 1, 2}
_VOLUME = re.compile(r"(test-)?volume-(\d+)")
_FILE = re.compile(r"((?:test-)?segmentation-\d+)\.nii(?:\.gz)?", re.IGNORECASE)


class Lits(Format):
    """``test-segmentation-N.nii`` and ``segmentation-N.nii``; read back also as ``.nii.gz``."""

    name: ClassVar[str] = "lits"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One file per volume; of a volume its compact label map (one byte a voxel) is held.

        Raises:
            ConfigError: classes other than 0, 1 and 2.
            DataError: ``missing-slice``, ``not-a-volume``, ``bad-name`` (not a volume of LiTS), ``unknown-label``.
        """
        strange = sorted({c.label_id for c in classes.classes} - _LABEL_IDS)
        if strange:
            raise ConfigError(f"LiTS has the labels 0, 1 and 2, not {strange[0]}", "map the classes, or export png")
        known = reading.known_ids(classes)
        for volume_id, slices in itertools.groupby(rows, lambda row: row.group_id or row.sample_id):
            output.put(f"{_file_stem(volume_id)}.nii", _file(volume_id, slices, known))

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``; files are found by name, in any folder. CTs that lie beside them are passed over.

        Raises:
            ConfigError: also two files of one volume.
        """
        found = _found(files)
        used: set[str] = set()
        for sample in samples:
            stem = _stem_of(sample.sample_id)
            info = found.get(stem)
            used.add(stem)
            uri = info.uri if info else files.uri(f"{stem}.nii")
            yield item_of(sample, uri, info.etag if info else reading.MISSING, info.size if info else 0)
        refuse_unknown([info.uri for stem, info in found.items() if stem not in used], files.source)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """The label maps of a volume's slices, streamed.

        Raises:
            DataError: missing, broken, not labels, or of another shape than the CT.
        """
        try:
            header = lits.header_of(item.uri)
        except ObjectMissing as error:
            raise missing(item) from error
        _check_shape(header, item)
        for k, pixels in enumerate(lits.slices_of(item.uri, header)):
            try:
                label = volume.label_slice(pixels, header.slope, header.intercept, item.uri)
            except DataError as error:
                raise DataError(f"slice {k}: {error.problem}", error.fix, error.code, item.uri) from error
            yield Prediction(semantic=label)


def _stem_of(volume_id: str) -> str:
    """Name of a volume's segmentation without suffix; of a strange volume its own id, which no file has."""
    found = _VOLUME.fullmatch(volume_id)
    return f"{found[1] or ''}segmentation-{found[2]}" if found else volume_id


def _file_stem(volume_id: str) -> str:
    if not _VOLUME.fullmatch(volume_id):
        problem = f"{volume_id!r} is no volume of LiTS, which are called volume-N or test-volume-N"
        raise DataError(problem, "export it in another format", "bad-name")
    return _stem_of(volume_id)


def _file(volume_id: str, slices: Iterator[Labels], known: NDArray[np.bool_]) -> bytes:
    first = next(slices)
    if first.volume is None:
        problem = f"{first.sample_id} is an image, not the slice of a volume"
        raise DataError(problem, "export it in another format", "not-a-volume")
    header = volume.parse_header(first.volume.header, first.image_uri)
    file = storage.buffer()
    volume.write(file, header, _maps(volume_id, header, itertools.chain([first], slices), known), "uint8")
    return file.getvalue()


def _maps(volume_id: str, header: Header, slices: Iterable[Labels], known: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
    """The label maps, once it is clear that they are all there and in order."""
    count = header.shape[2]
    expected = 0
    for row in slices:
        assert row.semantic is not None
        index = row.volume.index if row.volume else expected
        if index != expected:
            raise _missing_slice(volume_id, expected, count)
        reading.check_ids(row.semantic, known, row.sample_id)
        yield row.semantic
        expected += 1
    if expected != count:
        raise _missing_slice(volume_id, expected, count)


def _missing_slice(volume_id: str, index: int, count: int) -> DataError:
    problem = f"{volume_id} lacks slice {index} of its {count} (counted from 0) among the rows"
    return DataError(problem, "mend the bad rows: a volume is written whole or not at all", "missing-slice")


def _found(files: Tree) -> dict[str, ObjectInfo]:
    """Segmentations by their lower-case names without suffix."""
    found: dict[str, ObjectInfo] = {}
    for path, info in files.files("", lits.SUFFIXES):
        name = _FILE.fullmatch(path.rsplit("/", 1)[-1])
        if name is None:
            continue
        kept = found.setdefault(name[1].lower(), info)
        if kept is not info:
            raise ConfigError(f"{kept.uri} and {info.uri} are of the same volume", "remove one of them")
    if not found:
        expected = "expected test-segmentation-N.nii or segmentation-N.nii"
        raise ConfigError(f"{files.source} holds no segmentation of LiTS", expected)
    return found


def _check_shape(header: Header, item: PlanItem) -> None:
    (ni, nj, nk), (height, width) = header.shape, size_of(item)
    if (nj, ni, nk) != (height, width, item.rows):
        problem = (
            f"the prediction {item.uri} is {ni} x {nj} with {nk} slices, its CT {width} x {height} with {item.rows}"
        )
        raise DataError(problem, "write it on the CT's own grid", "size-mismatch", item.uri)
