"""LiTS: CT volumes of the abdomen with liver and lesion labels.

``volume-N.nii`` beside ``segmentation-N.nii`` (131 training cases in the folders ``Training Batch 1`` and
``Training Batch 2``) and ``test-volume-N.nii`` (70 cases whose labels are not public). Folders do not matter, only
the names do; ``.nii.gz`` is read as well.

Source: P. Bilic et al., "The Liver Tumor Segmentation Benchmark (LiTS)", arXiv 1901.04056 (Medical Image Analysis 84,
2023); competitions.codalab.org/competitions/17094 (``Training_Batch1.zip`` holds
``media/nas/01_Datasets/CT/LITS/Training Batch 1/volume-0.nii``).
"""

import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch import storage
from segbatch.codecs import volume
from segbatch.codecs.volume import Header
from segbatch.datasets import pairing, reading
from segbatch.datasets.base import Dataset
from segbatch.datasets.tables import load
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, ObjectMissing, StorageError
from segbatch.records import ClassTable, Issue, PlanItem, Sample, Task
from segbatch.storage import ObjectInfo

SUFFIXES = (".nii", ".nii.gz")

GEOMETRY = "geometry-differs"
"""Code of the issue of slices whose labels pair by index, but lie elsewhere by their header."""

_SPLITS = ("train", "test")
_NAME = re.compile(r"(?P<test>test-)?(?P<kind>volume|segmentation)-(?P<number>\d+)\.nii(?:\.gz)?", re.IGNORECASE)
_FOLDER = re.compile("batch|lits|volume|segmentation", re.IGNORECASE)
"""Folders that ``recognises`` looks into; the last two are Kaggle's."""

_HEAD = 1 << 16
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Case:
    """The files of one volume; one of the two may be missing."""

    sample_id: str
    split: str
    ct: ObjectInfo | None
    labels: ObjectInfo | None


class Lits(Dataset):
    """``volume-N.nii[.gz]`` with ``segmentation-N.nii[.gz]``, and ``test-volume-N.nii[.gz]``, in any folders.

    An item is a volume, its rows are the slices ``volume-N/0000`` ... in the order of the file.
    """

    name: ClassVar[str] = "lits"
    tasks: ClassVar[tuple[Task, ...]] = ("semantic",)
    official_splits: ClassVar[tuple[str, ...]] = _SPLITS
    formats: ClassVar[tuple[str, ...]] = ("lits",)
    grouped: ClassVar[bool] = True

    def recognises(self, tree: Tree) -> bool:
        """Whether a volume lies here, or directly in a folder that is called like LiTS's."""
        folders = ["", *(f for f in tree.folders() if _FOLDER.search(f))]
        names = (path for folder in folders for path, _ in tree.files(folder, SUFFIXES, recursive=False))
        return any(m and m["kind"].lower() == "volume" for m in map(_NAME.fullmatch, names))

    def classes(self, tree: Tree) -> ClassTable:
        """Background, liver and lesion: the values 0, 1 and 2."""
        return load(self.name)

    def splits(self, tree: Tree) -> tuple[str, ...]:
        """``train`` for ``volume-N``, ``test`` for ``test-volume-N``."""
        return _splits(_cases(tree)[0])

    def items(self, tree: Tree, splits: Sequence[str]) -> Iterator[PlanItem]:
        """The volumes by their numbers; of each the header is read, 16 at a time.

        Raises:
            ConfigError: no file of these names, or no such split.
        """
        cases, twins = _cases(tree)
        there = _splits(cases)
        if not there:
            raise ConfigError(f"{tree.source} is not LiTS", "expected volume-N.nii and segmentation-N.nii")
        for split in reading.choose_splits(self.name, tree.source, there, splits):
            yield from _planned(c for c in cases if c.split == split)
            yield from (pairing.twin(path, info, kept, s) for path, info, kept, s in twins if s == split)

    def read(self, item: PlanItem) -> Iterator[Sample]:
        """The slices of one volume, streamed one by one.

        Labels of another affine pair by index all the same: issue ``geometry-differs`` on every row. The last slice
        comes only after the checksum of a gzipped file was found good.

        Raises:
            DataError: from the slice on where it is found: ``missing-image``, ``missing-label``, ``size-mismatch``
                (CT and labels of different shapes), ``changed-volume``, ``bad-label``, ``unknown-label``, and what
                ``codecs.volume`` says of broken files (``truncated-volume``, ``corrupt-volume``, ...).
        """
        pairing.check(item)
        detail = reading.detail_of(item)
        ct = _ct_header(item)
        labels = _Labels.of(str(detail["label"]), item.uri, ct) if detail["label"] else None
        attributes = {"orientation": volume.orientation(ct), "zooms_mm": list(ct.spacing_mm)}
        maps = labels.maps() if labels else None
        for k, pixels in enumerate(slices_of(item.uri, ct)):
            label = next(maps) if maps else None
            image, image_format = volume.encode_slice(pixels)
            yield Sample(
                sample_id=item.row_id(k),
                image=image,
                image_format=image_format,
                image_uri=item.uri,
                height=ct.shape[1],
                width=ct.shape[0],
                channels=1,
                semantic=label,
                volume=volume.slice_record(ct, k),
                attributes=attributes,
                issues=labels.issues if labels else (),
            )


def header_of(uri: str) -> Header:
    """The header of a volume; of a large file only its first 64 kB are read.

    Raises:
        ObjectMissing: it is not there.
        DataError: as ``volume.read_header``.
    """
    head = storage.read_range(uri, 0, _HEAD)
    try:
        return volume.read_header(io.BytesIO(head), uri)
    except DataError as error:
        if error.code != "truncated-volume" or len(head) < _HEAD:
            raise
    with storage.open_stream(uri) as stream:  # extensions of many kilobytes stand before the voxels
        return volume.read_header(stream, uri)


def slices_of(uri: str, header: Header) -> Iterator[NDArray[Any]]:
    """The slices of a volume as ``volume.slices`` gives them; the last one once the file's end has been found good.

    So whatever is wrong with the file is found while there is still a slice to blame it on.
    """
    with storage.open_stream(uri) as stream:
        for k, pixels in enumerate(volume.slices(stream, header, uri), 1):
            if k < header.shape[2]:
                yield pixels
    yield pixels


@dataclass(frozen=True, slots=True)
class _Labels:
    """The label volume of a CT, of the same shape."""

    uri: str
    header: Header
    issues: tuple[Issue, ...]

    @classmethod
    def of(cls, uri: str, ct_uri: str, ct: Header) -> "_Labels":
        try:
            header = header_of(uri)
        except ObjectMissing as error:
            problem, fix = f"label volume {uri} is not there", "add it or remove the CT"
            raise DataError(problem, fix, "missing-label", uri) from error
        apart = volume.geometry_differs(ct, header)
        if header.shape != ct.shape:
            problem = f"label volume {uri} does not fit its CT {ct_uri}: {apart}"
            raise DataError(problem, "make the labels on the CT's own grid", "size-mismatch", uri)
        message = f"label volume {uri} lies elsewhere than its CT, by its header; CT against labels: {apart}"
        return cls(uri, header, (Issue(GEOMETRY, message),) if apart else ())

    def maps(self) -> Iterator[NDArray[np.uint16]]:
        """Label maps by slice, checked."""
        known = reading.known_ids(load(Lits.name))
        for k, pixels in enumerate(slices_of(self.uri, self.header)):
            try:
                label = volume.label_slice(pixels, self.header.slope, self.header.intercept, self.uri)
                reading.check_ids(label, known, self.uri)
            except DataError as error:
                raise DataError(f"slice {k}: {error.problem}", error.fix, error.code, self.uri) from error
            yield label


def _ct_header(item: PlanItem) -> Header:
    try:
        header = header_of(item.uri)
    except ObjectMissing as error:
        problem, fix = f"volume {item.uri} is not there", "restore the file or remove its labels"
        raise DataError(problem, fix, "missing-image", item.uri) from error
    if header.shape[2] != item.rows:
        problem = f"volume {item.uri} has {header.shape[2]} slices now, {item.rows} when it was planned"
        raise DataError(problem, "run again", "changed-volume", item.uri)
    return header


def _splits(cases: Iterable[_Case]) -> tuple[str, ...]:
    there = {c.split for c in cases}
    return tuple(s for s in _SPLITS if s in there)


def _cases(tree: Tree) -> tuple[list[_Case], list[tuple[str, ObjectInfo, str, str]]]:
    """All cases by split and number; and files whose case has another of their kind, as (path without suffix, file,
    address of the other, split)."""
    files: dict[tuple[str, str, str], ObjectInfo] = {}
    twins = []
    for path, info in tree.files("", SUFFIXES):
        found = _NAME.fullmatch(path.rsplit("/", 1)[-1])
        if not found:
            continue
        split, key = _SPLITS[bool(found["test"])], (found["kind"].lower(), found["number"])
        kept = files.setdefault((split, *key), info)
        if kept is not info:
            twins.append((path, info, kept.uri, split))
    cases = sorted({(_SPLITS.index(split), int(number), number) for split, _, number in files})
    return [_case(files, _SPLITS[order], number) for order, _, number in cases], twins


def _case(files: dict[tuple[str, str, str], ObjectInfo], split: str, number: str) -> _Case:
    prefix = "test-" if split == "test" else ""
    ct, labels = (files.get((split, kind, number)) for kind in ("volume", "segmentation"))
    return _Case(f"{prefix}volume-{number}", split, ct, labels)


def _planned(cases: Iterable[_Case]) -> Iterator[PlanItem]:
    """Items in order; headers are read ahead by threads."""
    waiting: deque[Future[PlanItem]] = deque()
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="header") as pool:
        for case in cases:
            waiting.append(pool.submit(_item, case))
            if len(waiting) > 2 * _AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _item(case: _Case) -> PlanItem:
    ct, labels = case.ct, case.labels
    beside = labels.uri if labels else ct.uri if ct else ""
    expected = {kind: _sibling(beside, kind) for kind in ("volume", "segmentation")}
    label_uri = labels.uri if labels else expected["segmentation"] if case.split == "train" else ""
    return PlanItem(
        sample_id=case.sample_id,
        uri=ct.uri if ct else expected["volume"],
        etag=reading.joint_etag(ct, labels),
        bytes=sum(i.size for i in (ct, labels) if i),
        rows=_rows(ct.uri) if ct else 1,
        detail=json.dumps({"label": label_uri}),
        group_id=case.sample_id,
        split=case.split,
    )


def _sibling(uri: str, kind: str) -> str:
    """Where the other file of a case would lie: the same address with the other word in its name."""
    folder, _, name = uri.rpartition("/")
    return f"{folder}/{re.sub('volume|segmentation', kind, name, flags=re.IGNORECASE)}"


def _rows(uri: str) -> int:
    """Slices of a volume; 1 where its header cannot be read: ``read`` says why, in that one row."""
    try:
        return header_of(uri).shape[2]
    except DataError:
        return 1
    except StorageError as error:
        if error.retryable:
            raise
        return 1
