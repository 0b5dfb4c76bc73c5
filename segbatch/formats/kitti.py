"""Result formats of KITTI semantics 2015, as its devkit and server take them.

Source: README and ``evalPixelLevelSemanticLabeling.py`` of the devkit (cvlibs.net/datasets/kitti/eval_semseg.php and
eval_instance_seg.php, benchmark=semantics2015; the output structure is that of the input).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np

from segbatch.codecs import png
from segbatch.datasets import reading
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError
from segbatch.formats.base import Format, Labels, Output, SampleRef
from segbatch.formats.cityscapes import MaskLists, check_classes, check_semantic
from segbatch.formats.files import item_of, missing, refuse_unknown, stem_of
from segbatch.records import ClassTable, PlanItem, Prediction, Task
from segbatch.storage import ObjectInfo


class Kitti(Format):
    """Label maps: ``SPLIT/semantic/NNNNNN_10.png``, 8-bit grey PNG of label ids, named like the photo.

    The server takes the content of ``testing/semantic/``. The import finds the files in any folder, as the devkit
    does, as long as training and testing cannot be confused.
    """

    name: ClassVar[str] = "kitti"
    task: ClassVar[Task] = "semantic"

    def write(self, rows: Iterator[Labels], classes: ClassTable, output: Output) -> None:
        """One PNG a row.

        Raises:
            ConfigError: classes that are not Cityscapes'.
            DataError: a label id that Cityscapes lacks.
        """
        check_classes(classes, self.name)
        for path, data in output.map(_file, rows):
            output.put(path, data)

    def items(self, files: Tree, samples: Iterable[SampleRef], classes: ClassTable) -> Iterator[PlanItem]:
        """See ``Format.items``."""
        for sample, info in _matched(files, samples, "semantic", ".png"):
            uri = info.uri if info else files.uri(_path(sample.sample_id, "semantic", ".png"))
            detail = {"found": info is not None}
            yield item_of(sample, uri, info.etag if info else reading.MISSING, info.size if info else 0, detail)

    def read(self, item: PlanItem) -> Iterator[Prediction]:
        """One label map.

        Raises:
            DataError: missing, broken, in colour, or with an id that Cityscapes lacks.
        """
        if not reading.detail_of(item)["found"]:
            raise missing(item)
        found = reading.read_label(item.uri)
        check_semantic(found, item.uri)
        yield Prediction(semantic=found.astype(np.uint16))


class KittiInstances(MaskLists):
    """Instances: ``SPLIT/instance/pred_list/NNNNNN_10.txt`` and ``SPLIT/instance/pred_img/NNNNNN_10_NNN.png``.

    See ``MaskLists``; label ids have three digits. The server takes the content of ``testing/instance/``.
    """

    name: ClassVar[str] = "kitti-instances"
    image_id: ClassVar[re.Pattern[str]] = re.compile(r"(\d{6}_\d\d)(?!\d)")

    def list_path(self, sample_id: str) -> str:
        """See ``MaskLists``."""
        return _path(sample_id, "instance/pred_list", ".txt")

    def mask_path(self, sample_id: str, number: int) -> str:
        """See ``MaskLists``."""
        return _path(sample_id, "instance/pred_img", f"_{number:03d}.png")

    def label_text(self, label_id: int) -> str:
        """See ``MaskLists``."""
        return f"{label_id:03d}"

    def lists(self, files: Tree, samples: Iterable[SampleRef]) -> Iterator[tuple[SampleRef, ObjectInfo | None]]:
        """See ``MaskLists``."""
        return _matched(files, samples, "instance/pred_list", ".txt")


def _file(row: Labels) -> tuple[str, bytes]:
    assert row.semantic is not None
    check_semantic(row.semantic, row.sample_id)
    return _path(row.sample_id, "semantic", ".png"), png.encode_grey(row.semantic, 8)


def _path(sample_id: str, folder: str, suffix: str) -> str:
    """SPLIT/FOLDER/NAME for the sample SPLIT/NAME."""
    split, _, name = stem_of(sample_id).rpartition("/")
    return "/".join(filter(None, (split, folder, f"{name}{suffix}")))


def _matched(
    files: Tree, samples: Iterable[SampleRef], folder: str, suffix: str
) -> Iterator[tuple[SampleRef, ObjectInfo | None]]:
    """Every sample with its file: the one at its path, else the only one of its name.

    Where there are folders called ``folder``, files elsewhere (photos, masks) do not count.

    Raises:
        ConfigError: no file at all, files that belong to no sample, a name that several samples or files have.
    """
    found = dict(files.files("", (suffix,)))
    found = {path: info for path, info in found.items() if f"/{folder}/" in f"/{path}"} or found
    if not found:
        raise ConfigError(f"{files.source} holds no file that ends in {suffix}", "check the format")
    wanted = [(sample, _path(sample.sample_id, folder, suffix)) for sample in samples]
    placed = {path for _, path in wanted if path in found}
    elsewhere: dict[str, list[ObjectInfo]] = {}
    for path, info in found.items():
        if path not in placed:
            elsewhere.setdefault(_name(path), []).append(info)
    claims = Counter(_name(path) for _, path in wanted if path not in placed)
    for sample, path in wanted:
        others = elsewhere.get(_name(path), []) if path not in placed else []
        if len(others) > 1 or (others and claims[_name(path)] > 1):
            problem = f"{others[0].uri} cannot be told to be of {sample.sample_id} alone"
            raise ConfigError(problem, f"put the result of {sample.sample_id} at {path}")
        yield sample, others[0] if others else found.get(path)
    refuse_unknown([i.uri for name, infos in elsewhere.items() if name not in claims for i in infos], files.source)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
