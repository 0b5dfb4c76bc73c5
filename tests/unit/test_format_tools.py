"""Formats of annotation and training tools: what they write by an independent reading, and what they read back."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import generators
import numpy as np
import pytest
import yaml
from generators import save
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from segbatch.codecs import rle
from segbatch.datasets.class_file import read_class_file
from segbatch.datasets.image_masks import ImageMasks
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.formats import label_studio, yolo_seg
from segbatch.formats.base import Format, Labels, SampleRef
from segbatch.formats.cvat import Cvat, CvatSemantic
from segbatch.formats.fiftyone import FiftyOne
from segbatch.formats.files import PhotoNames, instance_of, match_paths, photo_path, tree_of
from segbatch.formats.label_studio import LabelStudio, LabelStudioSemantic
from segbatch.formats.png import Png
from segbatch.formats.yolo_seg import YoloSeg
from segbatch.records import ClassInfo, ClassTable, Instance, Prediction
from segbatch.stages.exporting import Folder

CLASSES = ClassTable(
    (
        ClassInfo(0, "floor", (10, 20, 30)),
        ClassInfo(3, 'cart "A" & <b>', (200, 0, 0), isthing=True),
        ClassInfo(900, "Persön: #1", (0, 0, 255), isthing=True),
        ClassInfo(255, "void", ignore=True),
    )
)
CART, PERSON = 3, 900
SIZE = (24, 32)
INSTANCE_FORMATS = [YoloSeg(), LabelStudio(), Cvat()]
SEMANTIC_FORMATS = [LabelStudioSemantic(), CvatSemantic(), FiftyOne(), Png()]

Mask = NDArray[np.bool_]


def box(top: int, left: int, down: int, across: int, size: tuple[int, int] = SIZE) -> Mask:
    found = np.zeros(size, bool)
    found[top : top + down, left : left + across] = True
    return found


def thing(number: int, category_id: int, mask: Mask, score: float | None = None) -> Instance:
    return instance_of(number, category_id, rle.encode(mask), (mask.shape[0], mask.shape[1]), score)


def row(name: str = "train/one", things: Sequence[Instance] = (), **changes: Any) -> Labels:
    semantic = generators.labels(len(name), (0, 3, 255, 900), SIZE)
    made = Labels(name, f"/data/images/{name}.jpg", *SIZE, semantic=semantic, instances=tuple(things), is_truth=True)
    return replace(made, **changes)


def two_things() -> list[Instance]:
    """One in two parts with a hole, one at the corner of the photo; they overlap."""
    ring = box(2, 2, 12, 14) & ~box(5, 5, 3, 4) | box(18, 20, 3, 3)
    return [thing(7, PERSON, ring), thing(4, CART, box(0, 10, 9, 22))]


def write(form: Format, out: Path, rows: Iterable[Labels], classes: ClassTable = CLASSES) -> Path:
    form.write(iter(rows), classes, Folder(str(out), 2))
    return out


def refs(rows: Iterable[Labels]) -> list[SampleRef]:
    return [SampleRef(r.sample_id, r.image_uri, "e1", r.height, r.width) for r in rows]


def read(form: Format, source: Path, rows: Iterable[Labels], classes: ClassTable = CLASSES) -> list[Prediction]:
    items = list(form.items(tree_of(str(source)), iter(refs(rows)), classes))
    return [prediction for item in items for prediction in form.read(item)]


def problem(form: Format, source: Path, rows: Iterable[Labels], classes: ClassTable = CLASSES) -> DataError:
    with pytest.raises(DataError) as caught:
        read(form, source, rows, classes)
    assert str(caught.value).count("\n") == 0 and caught.value.fix
    return caught.value


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def masks_of(prediction: Prediction) -> list[tuple[int, bytes]]:
    assert prediction.instances is not None
    return [(i.category_id, i.counts) for i in prediction.instances]


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", INSTANCE_FORMATS, ids=lambda f: str(f.name))
def test_instances_come_back_with_holes_and_parts(form: Format, tmp_path: Path) -> None:
    rows = [row("train/one", two_things()), row("val/one"), row("a b.c/ünï", two_things()[:1])]
    found = read(form, write(form, tmp_path / "out", rows), rows)
    assert [masks_of(p) for p in found] == [[(i.category_id, i.counts) for i in r.instances or ()] for r in rows]
    for prediction in found:
        for i in prediction.instances or ():
            assert i.area == rle.area(i.counts) and i.bbox_xywh == rle.bbox(i.counts, *SIZE) and i.score is None


@pytest.mark.parametrize("form", SEMANTIC_FORMATS, ids=lambda f: str(f.name))
def test_label_maps_come_back_bit_for_bit(form: Format, tmp_path: Path) -> None:
    rows = [row("train/one"), row("val/one"), row("a b.c/ünï", semantic=np.full(SIZE, 255, np.uint16))]
    found = read(form, write(form, tmp_path / "out", rows), rows)
    for prediction, wanted in zip(found, rows, strict=True):
        assert prediction.instances is None and prediction.semantic is not None and wanted.semantic is not None
        assert prediction.semantic.dtype == np.uint16 and np.array_equal(prediction.semantic, wanted.semantic)


@pytest.mark.parametrize("form", [LabelStudio(), Cvat(), YoloSeg()], ids=lambda f: str(f.name))
def test_a_class_that_the_table_lacks_is_an_error(form: Format, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train/one.*5") as caught:
        write(form, tmp_path / "out", [row(things=[thing(1, 5, box(0, 0, 2, 2))])])
    assert caught.value.code == "unknown-label"


@pytest.mark.parametrize("form", [LabelStudio(), Cvat(), YoloSeg()], ids=lambda f: str(f.name))
def test_instances_without_a_pixel_are_left_out(form: Format, tmp_path: Path) -> None:
    rows = [row(things=[thing(1, CART, box(0, 0, 0, 0)), thing(2, CART, box(1, 1, 2, 2))])]
    assert len(masks_of(read(form, write(form, tmp_path / "out", rows), rows)[0])) == 1


@pytest.mark.parametrize("form", [*INSTANCE_FORMATS, *SEMANTIC_FORMATS], ids=lambda f: str(f.name))
def test_predictions_of_unknown_images_and_empty_folders_are_refused(form: Format, tmp_path: Path) -> None:
    rows = [row("train/one", two_things()), row("val/two", two_things())]
    write(form, tmp_path / "out", rows)
    with pytest.raises(ConfigError, match="two"):
        read(form, tmp_path / "out", rows[:1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no"):
        read(form, tmp_path / "empty", rows)


@pytest.mark.parametrize("form", [LabelStudio(), Cvat(), FiftyOne(), Png()], ids=lambda f: str(f.name))
def test_an_image_without_a_prediction_is_a_missing_one(form: Format, tmp_path: Path) -> None:
    rows = [row("train/one", two_things()), row("val/two")]
    write(form, tmp_path / "out", rows[:1])
    error = problem(form, tmp_path / "out", rows[1:] + rows[:1])
    assert error.code == "missing-prediction" and "two" in error.problem


# -- Ultralytics -----------------------------------------------------------------------------------------------------


def test_yolo_writes_what_ultralytics_reads(tmp_path: Path) -> None:
    rows = [
        row("train/one", [thing(1, PERSON, box(6, 8, 12, 16))], split="train"),
        row("val/one", split="validation"),
        row("val/two.b", [thing(1, CART, box(0, 0, 24, 32)), thing(2, CART, box(0, 0, 3, 8))], split="val"),
    ]
    out = write(YoloSeg(), tmp_path / "out", rows)
    labels = ["labels/train/one.txt", "labels/val/one.txt", "labels/val/two.b.txt"]
    assert files(out) == ["data.yaml", *labels, "train.txt", "val.txt"]
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "train": "train.txt",
        "val": "val.txt",
        "nc": 2,
        "names": {0: 'cart "A" & <b>', 1: "Persön: #1"},
    }
    assert (out / "val.txt").read_text() == "./images/val/one.jpg\n./images/val/two.b.jpg\n"
    assert (out / labels[1]).read_text() == ""
    assert (out / labels[2]).read_text() == "0 1 0 1 1 0 1 0 0\n0 0.25 0 0.25 0.125 0 0.125 0 0\n"
    index, *numbers = (out / labels[0]).read_text().split()
    corners = np.array(numbers, float).reshape(-1, 2) * (SIZE[1], SIZE[0])
    assert index == "1" and {tuple(c) for c in corners.tolist()} == {(8, 6), (24, 6), (24, 18), (8, 18)}


@pytest.mark.parametrize(
    ("splits", "data"),
    [([""], "train: train.txt\nval: train.txt\n"), (["test", "val"], "train: val.txt\nval: val.txt\ntest: test.txt\n")],
)
def test_yolo_names_the_required_splits(splits: list[str], data: str, tmp_path: Path) -> None:
    rows = [row(f"s/{i}", split=s) for i, s in enumerate(splits)]
    assert (write(YoloSeg(), tmp_path, rows) / "data.yaml").read_text().startswith(data)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans()))
def test_joined_outlines_are_the_mask_by_cocos_own_drawing(mask: Mask) -> None:
    mask = np.kron(mask, np.ones((2, 3), bool)).astype(bool)
    if not mask.any():
        return
    outlines = yolo_seg.polygon_of(mask)
    height, width = mask.shape
    polygon = [float(f"{v:.6g}") for v in (outlines / (width, height)).reshape(-1)]
    pixels = (np.array(polygon).reshape(-1, 2) * (width, height)).reshape(-1).tolist()
    drawn = coco_mask.decode(coco_mask.frPyObjects([pixels], height, width))[..., 0].astype(bool)
    assert np.array_equal(drawn, mask)


def test_yolo_leaves_crowds_out(tmp_path: Path) -> None:
    crowd = replace(thing(1, PERSON, box(0, 0, 4, 4)), iscrowd=True)
    rows = [row(things=[crowd, thing(2, CART, box(8, 8, 4, 4))])]
    assert [c for c, _ in masks_of(read(YoloSeg(), write(YoloSeg(), tmp_path, rows), rows)[0])] == [CART]


def test_yolo_reads_confidences_bare_folders_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\ufeff1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75 0.875\n\n0 0 0 1 0 1 1\n")
    found = read(YoloSeg(), tmp_path, [row("train/one"), row("train/two")])
    first, second = found[0].instances or ()
    assert (first.category_id, first.score, second.category_id, second.score) == (PERSON, 0.875, CART, None)
    assert np.array_equal(rle.decode(first.counts, *SIZE), box(6, 8, 12, 16)) and (first.id, second.id) == (1, 2)
    triangle = coco_mask.frPyObjects([[0, 0, 32, 0, 32, 24]], *SIZE)[0]["counts"]
    assert second.counts == triangle
    assert found[1].instances == ()


def test_yolo_takes_the_order_of_the_names_from_the_data_file(tmp_path: Path) -> None:
    rows = [row("train/one", two_things())]
    write(YoloSeg(), tmp_path, rows)
    (tmp_path / "data.yaml").write_text('names: ["Persön: #1", "cart \\"A\\" & <b>"]\n')
    assert [c for c, _ in masks_of(read(YoloSeg(), tmp_path, rows)[0])] == [CART, PERSON]
    (tmp_path / "data.yaml").write_text("names: {0: boat}\n")
    with pytest.raises(ConfigError, match=r"data.yaml has a class 'boat'"):
        read(YoloSeg(), tmp_path, rows)
    for text in ("names: 5\n", "nc: 2\n", "names: {0: a, 2: b}\n", "}{", "\xff"):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"data.yaml has no list of names"):
            read(YoloSeg(), tmp_path, rows)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("0 0.5 0.5 0.2 0.2", "bad-prediction", "has 4 numbers after the class, no polygon"),
        ("0 0 0 1 0 1 x", "bad-prediction", "is not numbers"),
        ("0 0 0 1 0 1 1.5", "bad-prediction", "outside 0..1"),
        ("0 0 0 1 0 1 nan", "bad-prediction", "outside 0..1"),
        ("0 0 0 1 0 1 1 7", "bad-prediction", "has the confidence 7"),
        ("2 0 0 1 0 1 1", "unknown-label", "has the class 2, not one of 0 to 1"),
        ("0.5 0 0 1 0 1 1", "unknown-label", "has the class 0.5"),
        ("inf 0 0 1 0 1 1", "unknown-label", "has the class inf"),
        ("-1 0 0 1 0 1 1", "unknown-label", "has the class -1"),
    ],
)
def test_yolo_names_the_line_that_is_wrong(line: str, code: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(f"0 0 0 1 0 1 1\n{line}\n")
    error = problem(YoloSeg(), tmp_path, [row("train/one")])
    assert error.code == code and says in error.problem and f"line 2 of {tmp_path}/one.txt" in error.problem


def test_yolo_without_things_counts_all_scored_classes_and_needs_some(tmp_path: Path) -> None:
    table = ClassTable((ClassInfo(9, "void", ignore=True), ClassInfo(4, "a"), ClassInfo(2, "b")))
    rows = [row(things=[thing(1, 2, box(0, 0, 24, 32))])]
    out = write(YoloSeg(), tmp_path / "out", rows, table)
    assert (out / "labels/train/one.txt").read_text().startswith("1 ")
    assert masks_of(read(YoloSeg(), out, rows, table)[0])[0][0] == 2
    with pytest.raises(ConfigError, match="needs classes"):
        write(YoloSeg(), tmp_path / "none", rows, ClassTable(()))


def test_yolo_needs_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"0 \xff")
    assert "UTF-8" in problem(YoloSeg(), tmp_path, [row("train/one")]).problem


# -- Label Studio ----------------------------------------------------------------------------------------------------


def brush_bits(values: Sequence[int]) -> bytes:
    """``encode_rle`` of label-studio-sdk, for runs of two and more, put down again as a string of bits."""
    text = f"{len(values):032b}{7:05b}" + "".join(f"{b - 1:04b}" for b in (3, 4, 8, 16))
    start = 0
    while start < len(values):
        stop = start
        while stop < len(values) and values[stop] == values[start]:
            stop += 1
        length = stop - start
        size = next((i for i, most in enumerate((8, 16, 256)) if length <= most), 3)
        while length > 0:
            piece = min(length, 65536)
            text += f"1{size:02b}{piece - 1:0{(3, 4, 8, 16)[size]}b}{values[start]:08b}"
            length -= piece
        start = stop
    text += "0" * (8 - len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def brush_values(data: bytes) -> list[int]:
    """``decode_rle`` of label-studio-sdk, put down again."""
    text, place = "".join(f"{b:08b}" for b in data), 0

    def take(bits: int) -> int:
        nonlocal place
        place += bits
        return int(text[place - bits : place], 2)

    count, word, sizes, found = take(32), take(5) + 1, [], []
    sizes = [take(4) + 1 for _ in range(4)]
    while len(found) < count:
        is_run = take(1)
        length = 1 + take(sizes[take(2)])
        found += [take(word)] * length if is_run else [take(word) for _ in range(length)]
    return found


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))), st.sampled_from([1, 7, 40]))
def test_the_brush_is_label_studios_bit_for_bit(mask: Mask, wide: int) -> None:
    mask = np.repeat(mask, wide, axis=1)
    data = label_studio.pack(rle.encode(mask), *mask.shape)
    assert data == brush_bits(np.repeat(mask.ravel() * 255, 4).tolist())
    assert brush_values(data) == np.repeat(mask.ravel() * 255, 4).tolist()
    assert np.array_equal(label_studio.unpack(data, *mask.shape), mask)


def test_a_brush_of_very_long_runs() -> None:
    mask = box(0, 0, 200, 300, (200, 300))
    mask[100:] = False
    data = label_studio.pack(rle.encode(mask), 200, 300)
    assert data == brush_bits(np.repeat(mask.ravel() * 255, 4).tolist())
    assert np.array_equal(label_studio.unpack(data, 200, 300), mask)


def test_a_brush_may_write_its_bytes_out() -> None:
    """Colours under the mask, as the tool's own canvas gives them: runs of single bytes are written one by one."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 1:] = (10, 20, 30, 128)
    pixels[1, 0] = (9, 9, 9, 0)
    text = f"{24:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    text += f"1{0:02b}{3:03b}{0:08b}" + f"0{2:02b}{7:08b}" + "".join(f"{v:08b}" for v in pixels[0, 1:].ravel())
    text += f"0{1:02b}{3:04b}" + "".join(f"{v:08b}" for v in pixels[1, 0]) + f"1{2:02b}{7:08b}{0:08b}"
    data = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    assert brush_values(data) == pixels.ravel().tolist()
    assert label_studio.unpack(data, 2, 3).tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d[:-2], "ends early"),
        (lambda d: b"", "ends early"),
        (lambda d: bytes([d[0], d[1], d[2], d[3] + 4, *d[4:]]), "has 3076 bytes, a photo of 32 x 24 has 3072"),
        (lambda d: bytes([*d[:4], d[4] | 0x80, *d[5:]]), "words have 24 bits"),
        (lambda d: d[:6] + b"\xff" * 9, "runs make 65536 bytes instead of 3072"),
    ],
)
def test_a_broken_brush_is_named(change: Callable[[bytes], bytes], says: str) -> None:
    data = label_studio.pack(rle.encode(box(3, 3, 9, 9)), *SIZE)
    with pytest.raises(ValueError, match=says):
        label_studio.unpack(change(data), *SIZE)


def tasks_in(folder: Path) -> list[dict[str, Any]]:
    return [t for path in sorted(folder.glob("tasks-*.json")) for t in json.loads(path.read_text())]


def test_label_studio_tasks_have_the_documented_form(tmp_path: Path) -> None:
    rows = [row("train/one", two_things()), row("val/one", [thing(1, CART, box(0, 0, 3, 3), 0.5)], is_truth=False)]
    out = write(LabelStudio(), tmp_path, rows)
    assert files(out) == ["labeling-config.xml", "tasks-0001.json"]
    truth, predicted = tasks_in(out)
    assert truth["data"] == {"image": "/data/images/train/one.jpg", "sample_id": "train/one"}
    assert set(truth) == {"data", "annotations"} and set(predicted) == {"data", "predictions"}
    region = predicted["predictions"][0]["result"][0]
    data = region["value"].pop("rle")
    assert region == {
        "id": "1",
        "type": "brushlabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 32,
        "original_height": 24,
        "image_rotation": 0,
        "score": 0.5,
        "value": {"format": "rle", "brushlabels": ['cart "A" & <b>']},
    }
    assert brush_values(bytes(data))[3::4] == (box(0, 0, 3, 3).ravel() * 255).tolist()
    assert [r["id"] for r in truth["annotations"][0]["result"]] == ["7", "4"]
    assert truth["annotations"][0]["ground_truth"] is True
    again = read(LabelStudio(), out, rows)
    assert [i.id for i in again[0].instances or ()] == [7, 4]
    assert [i.score for p in again for i in p.instances or ()] == [None, None, 0.5]


def test_the_labeling_configuration_names_the_classes(tmp_path: Path) -> None:
    view = ElementTree.parse(write(LabelStudio(), tmp_path, [row()]) / "labeling-config.xml").getroot()
    brush = view.find("BrushLabels")
    image = view.find("Image")
    assert view.tag == "View" and brush is not None and image is not None
    assert image.attrib["value"] == "$image" and brush.attrib == {"name": "label", "toName": image.attrib["name"]}
    assert [(e.attrib["value"], e.attrib.get("background")) for e in brush] == [
        ("floor", "#0a141e"),
        ('cart "A" & <b>', "#c80000"),
        ("Persön: #1", "#0000ff"),
        ("void", None),
    ]


def test_label_studio_cuts_large_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio, "_FILE_BYTES", 2000)
    rows = [row(f"s/{i}", two_things()) for i in range(5)]
    out = write(LabelStudio(), tmp_path, rows)
    assert len(list(out.glob("tasks-*.json"))) > 2
    assert [masks_of(p) for p in read(LabelStudio(), out, rows)] == [
        masks_of(Prediction(instances=tuple(two_things())))
    ] * 5


def result(kind: str, value: dict[str, Any], label: str = "floor", **more: Any) -> dict[str, Any]:
    size = {"original_width": 32, "original_height": 24, "image_rotation": 0}
    return {"id": "Dx_aB91ISN", "type": kind, **size, "value": {**value, kind: [label]}, **more}


def studio(folder: Path, *results: dict[str, Any], **task: Any) -> Path:
    found = {"data": {"image": "/data/images/train/one.jpg"}, "annotations": [{"result": list(results)}], **task}
    (folder / "export.json").write_text(json.dumps([found]))
    return folder / "export.json"


def test_label_studio_polygons_and_rectangles(tmp_path: Path) -> None:
    polygon = {"points": [[25, 25], [75, 25], [75, 75], [25, 75]]}
    rectangle = {"x": 50, "y": 50, "width": 25, "height": 50, "rotation": 90}
    other = [
        {"id": "c", "type": "choices", "value": {"choices": ["blurred"]}},
        result("keypointlabels", {"x": 1, "y": 1}),
    ]
    path = studio(tmp_path, result("polygonlabels", polygon), *other, result("rectanglelabels", rectangle, "void"))
    found = masks_of(read(LabelStudio(), path, [row("train/one")])[0])
    assert [c for c, _ in found] == [0, 255]
    assert np.array_equal(rle.decode(found[0][1], *SIZE), box(6, 8, 12, 16))
    assert np.array_equal(rle.decode(found[1][1], *SIZE), box(12, 4, 8, 12))  # a quarter turn around (16, 12)


def test_label_studio_draws_rectangles_as_cocos_polygons(tmp_path: Path) -> None:
    value = {"x": 40, "y": 20, "width": 30, "height": 40, "rotation": 30}
    path = studio(tmp_path, result("rectanglelabels", value))
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    left, top, across, down = 12.8, 4.8, 9.6, 9.6
    sides = [(0, 0), (across, 0), (across, down), (0, down)]
    corners = [c for a, b in sides for c in (left + a * cos - b * sin, top + a * sin + b * cos)]
    wanted = coco_mask.frPyObjects([corners], *SIZE)[0]["counts"]
    assert masks_of(read(LabelStudio(), path, [row("train/one")])[0])[0][1] == wanted


@pytest.mark.parametrize(
    "image",
    [
        "/data/images/train/one.jpg",
        "s3://bucket/images/train/one.jpg",
        "https://host/x/train/one.jpg?X-Amz-Signature=abc",
        "/data/local-files/?d=images/train/one.jpg",
        "/data/local-files/?d=images%2Ftrain%2Fone.jpg",
        "/data/upload/12/0a1b2c3d-one.jpg",
    ],
)
def test_label_studio_tasks_find_their_photo(image: str, tmp_path: Path) -> None:
    task = {"data": {"image": image}}
    path = studio(tmp_path, result("rectanglelabels", {"x": 0, "y": 0, "width": 100, "height": 100}), **task)
    assert len(masks_of(read(LabelStudio(), path, [row("train/one")])[0])) == 1


def answer(label: str, **more: Any) -> dict[str, Any]:
    return {"result": [result("rectanglelabels", {"x": 0, "y": 0, "width": 50, "height": 50}, label)], **more}


@pytest.mark.parametrize(
    ("task", "label_id"),
    [
        ({"annotations": [answer("floor")], "predictions": [answer("void")]}, 0),
        ({"annotations": [], "predictions": [answer("void")]}, 255),
        ({"annotations": [answer("floor"), answer("void", ground_truth=True)]}, 255),
        ({"annotations": [answer("floor", was_cancelled=True), answer("void")], "predictions": [4, 5]}, 255),
        ({"annotations": None, "predictions": [answer("void", model_version="m")]}, 255),
    ],
)
def test_label_studio_answers_that_count(task: dict[str, Any], label_id: int, tmp_path: Path) -> None:
    assert masks_of(read(LabelStudio(), studio(tmp_path, **task), [row("train/one")])[0])[0][0] == label_id


RECTANGLE = {"x": 0, "y": 0, "width": 50, "height": 50}


@pytest.mark.parametrize(
    ("task", "code", "says"),
    [
        ({"annotations": []}, "missing-prediction", "no prediction"),
        ({"annotations": [answer("floor"), answer("void")]}, "ambiguous", "has 2 answers"),
        ({"annotations": [{"result": [result("rectanglelabels", RECTANGLE, "boat")]}]}, "unknown-label", "'boat'"),
        (
            {"annotations": [{"result": [result("rectanglelabels", RECTANGLE, original_width=33)]}]},
            "size-mismatch",
            "for a photo of 33 x 24",
        ),
        (
            {"annotations": [{"result": [result("rectanglelabels", RECTANGLE, image_rotation=90)]}]},
            "bad-prediction",
            "rotated photo",
        ),
        ({"annotations": [{"result": [result("ellipselabels", {"x": 1, "y": 1})]}]}, "bad-prediction", "ellipselabels"),
        ({"annotations": [{"result": [result("brushlabels", {"rle": [1, 2]})]}]}, "bad-prediction", "ends early"),
        ({"annotations": [{"result": [result("brushlabels", {"rle": [300]})]}]}, "bad-prediction", "range(0, 256)"),
        ({"annotations": [{"result": [result("brushlabels", {"rle": "x"})]}]}, "bad-prediction", "Expected `array"),
        ({"annotations": [{"result": [{"value": {}}]}]}, "bad-prediction", "missing required field `type`"),
        (
            {"annotations": [{"result": [{**result("rectanglelabels", RECTANGLE), "type": "labels"}]}]},
            "bad-prediction",
            "has 0 classes",
        ),
    ],
)
def test_label_studio_says_what_is_wrong_with_a_task(
    task: dict[str, Any], code: str, says: str, tmp_path: Path
) -> None:
    error = problem(LabelStudio(), studio(tmp_path, **task), [row("train/one")])
    assert error.code == code and says in error.problem and "export.json" in error.problem


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "[{}]", "not json", '[{"data": {}, "annotations": [{}]}]', "\xff", "[" * 5000]
)
def test_other_json_is_not_label_studios(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"results.json is no list of Label Studio's tasks"):
        read(LabelStudio(), tmp_path, [row("train/one")])


def test_two_tasks_of_one_sample_are_refused(tmp_path: Path) -> None:
    write(LabelStudio(), tmp_path, [row("train/one")])
    (tmp_path / "again.json").write_bytes((tmp_path / "tasks-0001.json").read_bytes())
    with pytest.raises(ConfigError, match=r"again.json and .*tasks-0001.json have a task for the sample train/one"):
        read(LabelStudio(), tmp_path, [row("train/one")])


def test_a_changed_task_changes_only_its_own_tag(tmp_path: Path) -> None:
    rows = [row("train/one", two_things()), row("val/one", two_things())]
    out = write(LabelStudio(), tmp_path, rows)
    before = list(LabelStudio().items(tree_of(str(out)), refs(rows), CLASSES))
    write(LabelStudio(), tmp_path, [rows[0], replace(rows[1], instances=())])
    after = list(LabelStudio().items(tree_of(str(out)), refs(rows), CLASSES))
    assert before[0] == after[0] and before[1].etag != after[1].etag
    assert [i.uri for i in before] == [f"{out}/tasks-0001.json#train/one", f"{out}/tasks-0001.json#val/one"]


@pytest.mark.parametrize("form", [LabelStudioSemantic(), CvatSemantic()], ids=lambda f: str(f.name))
def test_bare_pixels_are_void_or_an_error(form: Format, tmp_path: Path) -> None:
    whole = row("train/one", semantic=np.where(box(0, 0, 12, 32), 3, 255).astype(np.uint16))
    instances = LabelStudio() if isinstance(form, LabelStudio) else Cvat()
    half = replace(whole, instances=(thing(1, CART, box(0, 0, 12, 32)),))
    out = write(instances, tmp_path / "out", [half])
    found = read(form, out, [whole])[0].semantic
    assert found is not None and np.array_equal(found, whole.semantic)
    without = ClassTable(tuple(c for c in CLASSES.classes if not c.ignore))
    error = problem(form, out, [whole], without)
    assert error.code == "unlabelled" and "384 pixels of train/one" in error.problem


# -- CVAT ------------------------------------------------------------------------------------------------------------


def cvat_mask(shape: ElementTree.Element, height: int, width: int) -> Mask:
    """As CVAT's own answer in its issue 6487 turns a mask into an image."""
    left, top, across = (int(shape.attrib[k]) for k in ("left", "top", "width"))
    found = np.zeros((height, width), bool)
    value = offset = 0
    for count in map(int, shape.attrib["rle"].split(",")):
        for _ in range(count):
            y, x = divmod(offset, across)
            found[y + top, x + left] = value
            offset += 1
        value = 1 - value
    assert offset == across * int(shape.attrib["height"])
    return found


def test_cvat_writes_what_cvat_reads(tmp_path: Path) -> None:
    rows = [
        row("train/one", two_things()),
        row("a b.c/ünï & <x>", is_truth=False),
        row("c", two_things(), is_truth=False),
    ]
    out = write(Cvat(), tmp_path, rows)
    assert files(out) == ["annotations.xml", "labels.json"]
    root = ElementTree.parse(out / "annotations.xml").getroot()
    assert root.tag == "annotations" and root.findtext("version") == "1.1"
    assert [e.text for e in root.findall("meta/task/labels/label/name")] == [c.name for c in CLASSES.classes]
    assert [e.attrib for e in root.findall("image")] == [
        {"id": str(n), "name": name, "width": "32", "height": "24"}
        for n, name in enumerate(("train/one.jpg", "a b.c/ünï & <x>.jpg", "c.jpg"))
    ]
    masks = root.findall("image/mask")
    assert [m.attrib["source"] for m in masks] == ["manual"] * 2 + ["auto"] * 2
    assert [m.attrib["label"] for m in masks] == ["Persön: #1", 'cart "A" & <b>'] * 2
    for mask, wanted in zip(masks, two_things() * 2, strict=True):
        assert np.array_equal(cvat_mask(mask, *SIZE), rle.decode(wanted.counts, *SIZE))
        assert set(mask.attrib) == {"label", "source", "occluded", "rle", "left", "top", "width", "height", "z_order"}
    labels = json.loads((out / "labels.json").read_text())
    assert labels[1] == {"name": 'cart "A" & <b>', "color": "#c80000", "type": "any", "attributes": []}


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_cvats_runs_are_the_mask(mask: Mask) -> None:
    from segbatch.formats import cvat

    if mask.any():
        shape = ElementTree.fromstring(f"<mask {cvat._rle(rle.encode(mask), *mask.shape)}/>")
        assert np.array_equal(cvat_mask(shape, *mask.shape), mask)
        assert cvat._counts(shape.attrib, *mask.shape) == rle.encode(mask)


def cvat_file(folder: Path, shapes: str, name: str = "train/one.jpg", size: tuple[int, int] = SIZE) -> Path:
    image = f'<image id="0" name="{name}" width="{size[1]}" height="{size[0]}">{shapes}</image>'
    (folder / "export.xml").write_text(f"<annotations><version>1.1</version><meta/>{image}</annotations>")
    return folder / "export.xml"


def test_cvat_polygons_and_boxes(tmp_path: Path) -> None:
    shapes = (
        '<polygon label="floor" points="8.00,6.00;24.00,6.00;24.00,18.00;8.00,18.00" z_order="0"/>'
        '<tag label="blurred"/><points label="floor" points="1,1"/><polyline label="floor" points="1,1;5,5"/>'
        '<box label="void" xtl="8.00" ytl="10.00" xbr="20.00" ybr="14.00"><attribute name="a">1</attribute></box>'
        '<box label="void" xtl="8.00" ytl="10.00" xbr="20.00" ybr="14.00" rotation="90.00"/>'
    )
    found = masks_of(read(Cvat(), cvat_file(tmp_path, shapes), [row("train/one")])[0])
    assert [c for c, _ in found] == [0, 255, 255]
    for (_, counts), wanted in zip(found, (box(6, 8, 12, 16), box(10, 8, 4, 12), box(6, 12, 12, 4)), strict=True):
        assert np.array_equal(rle.decode(counts, *SIZE), wanted)


MASK = '<mask label="{label}" rle="{rle}" left="{left}" top="2" width="3" height="2" z_order="0"/>'


def mask_tag(label: str = "floor", rle: str = "1, 5", left: str = "1") -> str:
    return MASK.format(label=label, rle=rle, left=left)


@pytest.mark.parametrize(
    ("shape", "code", "says"),
    [
        (mask_tag(label="boat"), "unknown-label", "'boat'"),
        (mask_tag(rle="1, 4"), "bad-prediction", "cover 5 pixels, its box has 6"),
        (mask_tag(rle="8, -2"), "bad-prediction", "cover 6 pixels"),
        (mask_tag(rle="x"), "bad-prediction", "invalid literal"),
        (mask_tag(left="30"), "bad-prediction", "does not lie in a photo of 32 x 24"),
        (mask_tag(left="-1"), "bad-prediction", "does not lie in"),
        ('<mask label="floor" rle="1"/>', "bad-prediction", "left"),
        ('<polygon label="floor" points="1,2;3"/>', "bad-prediction", "even number"),
        ('<polygon label="floor" points="1,2;nan,3;4,5"/>', "bad-prediction", "finite"),
        ('<ellipse label="floor" cx="3" cy="3" rx="2" ry="2"/>', "bad-prediction", "only masks, polygons and boxes"),
    ],
)
def test_cvat_says_what_is_wrong_with_a_shape(shape: str, code: str, says: str, tmp_path: Path) -> None:
    error = problem(Cvat(), cvat_file(tmp_path, shape), [row("train/one")])
    assert error.code == code and says in error.problem and "export.xml#train/one" in error.problem


def test_cvat_checks_the_size(tmp_path: Path) -> None:
    error = problem(Cvat(), cvat_file(tmp_path, "", size=(24, 33)), [row("train/one")])
    assert error.code == "size-mismatch" and "is 33 x 24, its photo is 32 x 24" in error.problem


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>', "document type declaration"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>', "document type declaration"),
        ("<annotations><track id='0' label='a'/></annotations>", "a task of a video"),
        ("<coco/>", "an element <coco> at depth 0"),
        ("<annotations>", "not well-formed"),
        ("", "not well-formed"),
        ("{}", "not well-formed"),
    ],
)
def test_other_xml_is_not_cvats(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "export.xml").write_text(text)
    with pytest.raises(ConfigError, match=f"export.xml .*{says}"):
        read(Cvat(), tmp_path, [row("train/one")])


def test_cvat_finds_photos_by_what_their_names_say(tmp_path: Path) -> None:
    rows = [row("train/one"), row("val/one"), row("val/two")]
    for name, place in (("one.jpg", None), ("images/val/one.jpg", 1), ("two.jpg", 2)):
        path = cvat_file(tmp_path, mask_tag(), name=name)
        if place is None:
            with pytest.raises(ConfigError, match=r"may be /data/images/train/one.jpg or /data/images/val/one.jpg"):
                read(Cvat(), path, rows)
        else:
            items = list(Cvat().items(tree_of(str(path)), refs(rows), CLASSES))
            assert [json.loads(i.detail)["shapes"] is not None for i in items] == [i == place for i in range(3)]


def test_two_images_of_one_sample_are_refused(tmp_path: Path) -> None:
    write(Cvat(), tmp_path, [row("train/one")])
    (tmp_path / "again.xml").write_bytes((tmp_path / "annotations.xml").read_bytes())
    with pytest.raises(ConfigError, match="are both the sample train/one"):
        read(Cvat(), tmp_path, [row("train/one")])


def test_xml_cannot_hold_every_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="XML cannot hold") as caught:
        write(Cvat(), tmp_path, [row("bell\a")])
    assert caught.value.code == "bad-name"


# -- FiftyOne and plain PNG ------------------------------------------------------------------------------------------


def test_fiftyone_folder_is_what_its_importer_takes(tmp_path: Path) -> None:
    rows = [row("train/one.a"), row("val/one", semantic=np.full(SIZE, 3, np.uint16))]
    out = write(FiftyOne(), tmp_path, rows)
    assert files(out) == ["data.json", "labels/train/one.a.png", "labels/val/one.png", "mask_targets.json"]
    photos = json.loads((out / "data.json").read_text())
    assert photos == {"train/one.a.jpg": rows[0].image_uri, "val/one.jpg": rows[1].image_uri}
    stems = {Path(p).with_suffix("") for p in photos}  # FiftyOne pairs by the path without its ending
    assert stems == {p.relative_to(out / "labels").with_suffix("") for p in (out / "labels").rglob("*.png")}
    assert json.loads((out / "mask_targets.json").read_text()) == {str(c.label_id): c.name for c in CLASSES.classes}
    for path, wanted, mode in zip(sorted((out / "labels").rglob("*.png")), rows, ("I;16", "L"), strict=True):
        with Image.open(path) as image:
            assert image.mode == mode and np.array_equal(np.array(image), wanted.semantic)


def test_fiftyone_lists_only_photos_that_it_can_open(tmp_path: Path) -> None:
    out = write(FiftyOne(), tmp_path, [row(image_uri="s3://bucket/train/one.jpg"), row("val/one")])
    assert "data.json" not in files(out)


def test_fiftyone_takes_no_photo_for_a_label_map(tmp_path: Path) -> None:
    rows = [row("train/one")]
    write(FiftyOne(), tmp_path, rows)
    generators.save(tmp_path / "data" / "train" / "one.png", generators.photo(0, SIZE))
    found = read(FiftyOne(), tmp_path, rows)[0].semantic
    assert found is not None and np.array_equal(found, rows[0].semantic)


def test_png_and_its_classes_are_a_dataset_of_ones_own(tmp_path: Path) -> None:
    rows = [row("train/one"), row("val/one", semantic=np.full(SIZE, 3, np.uint16))]
    write(Png(), tmp_path / "masks", rows)
    (tmp_path / "masks" / "classes.json").rename(tmp_path / "classes.json")
    for r in rows:
        generators.save(tmp_path / "images" / f"{r.sample_id}.png", generators.photo(1, SIZE))
    tree = Tree.of(str(tmp_path))
    assert ImageMasks().classes(tree) == CLASSES
    samples = [s for item in ImageMasks().items(tree, ()) for s in ImageMasks().read(item)]
    for sample, wanted in zip(samples, rows, strict=True):
        assert sample.sample_id == wanted.sample_id and np.array_equal(sample.semantic, wanted.semantic)


def test_png_writes_no_more_bits_than_needed(tmp_path: Path) -> None:
    maps = {
        "small": np.full(SIZE, 255, np.uint16),
        "large": np.full(SIZE, 256, np.uint16),
        "last": np.full(SIZE, 65535, np.uint16),
    }
    out = write(Png(), tmp_path, [row(name, semantic=m) for name, m in maps.items()])
    for name, wanted in maps.items():
        with Image.open(out / f"{name}.png") as image:
            assert image.mode == ("L" if name == "small" else "I;16") and np.array_equal(np.array(image), wanted)


def test_png_leaves_out_what_a_class_file_cannot_hold(tmp_path: Path) -> None:
    table = ClassTable(
        (
            ClassInfo(-1, "license plate", (0, 0, 142)),
            ClassInfo(1, "ego", (0, 0, 0), ignore=True),
            ClassInfo(2, "out", (0, 0, 0), ignore=True),
            ClassInfo(7, "road", (128, 64, 128), train_id=0, supercategory="flat"),
        )
    )
    out = write(Png(), tmp_path, [row()], table)
    wanted = tuple(replace(c, color=None) if c.ignore else c for c in table.classes[1:])
    assert read_class_file(str(out / "classes.json")).classes == wanted
    assert files(write(Png(), tmp_path / "none", [row()], ClassTable(()))) == ["train/one.png"]


def test_png_reads_palettes_and_refuses_colours(tmp_path: Path) -> None:
    image = Image.new("P", (SIZE[1], SIZE[0]))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    ImageDraw.Draw(image).rectangle((2, 3, 9, 9), fill=3)
    image.save(tmp_path / "one.png")
    found = read(Png(), tmp_path, [row("train/one")])[0].semantic
    assert found is not None and np.array_equal(found, box(3, 2, 7, 8) * 3)
    image.convert("RGB").save(tmp_path / "one.png")
    assert problem(Png(), tmp_path, [row("train/one")]).code == "label-type"
    (tmp_path / "one.png").write_bytes(b"")
    assert problem(Png(), tmp_path, [row("train/one")]).code == "empty-label"


def test_png_slices_of_a_volume(tmp_path: Path) -> None:
    slices = [row(f"ct/v1/{k:04d}", group_id="ct/v1", semantic=np.full(SIZE, k, np.uint16)) for k in range(3)]
    out = write(Png(), tmp_path, slices)
    volume = SampleRef("ct/v1", "/data/v1.nii", "e1", *SIZE, group_id="ct/v1", rows=3)
    (item,) = Png().items(tree_of(str(out)), [volume], CLASSES)
    found = [p.semantic for p in Png().read(item)]
    assert all(f is not None and np.array_equal(f, s.semantic) for f, s in zip(found, slices, strict=True))
    (out / "ct/v1/0001.png").unlink()
    (item,) = Png().items(tree_of(str(out)), [volume], CLASSES)
    with pytest.raises(DataError, match=r"no prediction at .*ct/v1/0001.png") as caught:
        list(Png().read(item))
    assert caught.value.code == "missing-prediction"


# -- finding files and photos ----------------------------------------------------------------------------------------


def test_photos_are_named_like_their_samples_but_as_files() -> None:
    assert photo_path(row("train/one")) == "train/one.jpg"
    assert photo_path(row("139", image_uri="s3://b/val2017/000000000139.jpg")) == "000000000139.jpg"
    assert photo_path(row("a/b", image_uri="/d/x.zip!/t/a/b.png")) == "a/b.png"


def test_photo_names_need_only_as_many_folders_as_tell_them_apart() -> None:
    photos = PhotoNames(refs(row(name, image_uri=f"/d/{name}.jpg") for name in ("a/x/1", "b/x/1", "b/y/2")))
    assert [photos.find(n) for n in ("2.jpg", "y/2.jpg", "a/x/1.jpg", "/q/b/x/1.jpg")] == [2, 2, 0, 1]
    assert [photos.find(n) for n in ("3.jpg", "c/x/1.jpg", "z/y/2.jpg", "x/2.jpg", "")] == [
        None,
        None,
        None,
        None,
        None,
    ]
    with pytest.raises(ConfigError, match=r"/d/a/x/1.jpg or /d/b/x/1.jpg"):
        photos.find("x/1.jpg")


def test_files_may_lie_in_more_or_fewer_folders_but_not_in_others(tmp_path: Path) -> None:
    def found(there: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        for name in there:
            save(tmp_path / "f" / name, np.zeros(SIZE, np.uint8))
        matched = match_paths(tree_of(f"{tmp_path}/f"), {w: w for w in wanted}, (".png",))
        return {path: str(Path(info.uri).relative_to(tmp_path / "f")) for path, info in matched.items()}

    both = ["a/1.png", "b/1.png"]
    assert found(both, both) == {p: p for p in both}
    assert found(["a/1.png"], both) == {"a/1.png": "a/1.png"}
    assert found(["1.png"], ["a/1.png"]) == {"a/1.png": "1.png"}
    assert found(["x/a/1.png", "x/b/1.png"], both) == {p: f"x/{p}" for p in both}
    for there, wanted in ((["b/1.png"], ["a/1.png"]), (["1.png"], both), (["x/1.png", "y/1.png"], ["1.png"])):
        with pytest.raises(ConfigError, match="not among the samples"):
            found(there, wanted)


def test_a_single_file_is_a_tree_without_its_neighbours(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    tree = tree_of(f"{tmp_path}/a.json")
    assert [path for path, _ in tree.files()] == ["a.json"] == [path for path, _ in tree.files("", (".json",))]
    assert tree.exists("") and tree.exists("a.json") and not tree.exists("b.json") and tree.stat("b.json") is None
    assert tree.is_folder("") and not tree.is_folder("a.json") and tree.folders() == []
    assert tree_of(str(tmp_path)) == Tree.of(str(tmp_path)) and not tree_of(f"{tmp_path}/none").exists("")
