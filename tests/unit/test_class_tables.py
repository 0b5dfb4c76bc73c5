"""Class tables: their counts and form, and each against every independent copy of the same facts that is at hand."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segbatch.datasets import camvid, tables
from segbatch.errors import ConfigError
from segbatch.records import ClassInfo, ClassTable

SharedData = Callable[[str], Path]

COUNTS = {  # scored classes, void classes
    "ade20k": (150, 1),
    "bdd100k-drivable": (2, 1),
    "bdd100k-ins": (8, 0),
    "bdd100k-lane": (8, 1),
    "bdd100k-pan": (40, 1),
    "bdd100k-sem": (19, 1),
    "camvid-32": (31, 1),
    "ccp": (59, 0),
    "cityscapes": (19, 15),
    "coco-instances": (80, 0),
    "coco-panoptic": (133, 0),
    "coco-stuff": (171, 1),
    "kitti": (19, 15),
    "lits": (3, 0),
    "pascal-context-459": (459, 1),
    "pascal-context-59": (59, 1),
    "pascal-context-60": (60, 0),
    "pascal-voc": (21, 1),
    "pratheepan": (2, 0),
    "sku110k": (1, 0),
}

SHARED_COLORS = {  # scored classes that have one official colour between them
    "ade20k": [{"road", "skyscraper"}],
    "bdd100k-pan": [{"ego vehicle", "static"}, {"parking sign", "person"}, {"pole", "polegroup"}],
}

REMOVED_FROM_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def document(name: str) -> dict[str, object]:
    text = (resources.files(tables) / f"{name}.json").read_text("utf-8")
    found: dict[str, object] = json.loads(text)
    return found


def by_name(table: ClassTable) -> dict[str, int]:
    return {c.name: c.label_id for c in table.classes}


def voc_color(index: int) -> tuple[int, int, int]:
    """The devkit's VOClabelcolormap: bits 0, 3, 6 of the index are red's from the highest on; then green, blue."""
    bits = [(index >> i) & 1 for i in range(8)]
    r, g, b = (sum(bit << (7 - j) for j, bit in enumerate(bits[first::3])) for first in range(3))
    return r, g, b


class TestEveryTable:
    def test_there_are_no_others(self) -> None:
        assert tables.names() == tuple(COUNTS)

    @pytest.mark.parametrize("name", COUNTS)
    def test_counts(self, name: str) -> None:
        table = tables.load(name)
        assert (len(table.scored), len(table.ignore_ids)) == COUNTS[name]

    @pytest.mark.parametrize("name", COUNTS)
    def test_ids_and_names_are_unique_and_fit(self, name: str) -> None:
        classes = tables.load(name).classes
        assert len({c.label_id for c in classes}) == len({c.name for c in classes}) == len(classes)
        assert all(0 <= c.label_id <= 65535 and c.name == c.name.strip() != "" for c in classes)
        train_ids = [c.train_id for c in classes if c.train_id is not None]
        assert len(set(train_ids)) == len(train_ids)

    @pytest.mark.parametrize("name", COUNTS)
    def test_colors_are_bytes_and_tell_scored_classes_apart(self, name: str) -> None:
        colors = [c.color for c in tables.load(name).classes if c.color]
        assert all(len(color) == 3 and all(0 <= channel <= 255 for channel in color) for color in colors)
        users: dict[tuple[int, int, int], set[str]] = {}
        for c in tables.load(name).scored:
            if c.color:
                users.setdefault(c.color, set()).add(c.name)
        shared = sorted((u for u in users.values() if len(u) > 1), key=min)
        assert shared == SHARED_COLORS.get(name, [])

    @pytest.mark.parametrize("name", COUNTS)
    def test_file_is_the_json_of_the_table_and_says_where_it_is_from(self, name: str) -> None:
        found = document(name)
        assert found["classes"] == tables.load(name).to_json()
        assert found["name"] == name
        assert found["source"] and found["licence"]

    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match=r"'cityscape'; did you mean cityscapes\?.*known: ade20k, bdd100k-"):
            tables.load("cityscape")
        with pytest.raises(ConfigError, match="unknown class table"):
            tables.load("../tables/ccp")


class TestCoco:
    def test_instances_are_the_official_file_s(self, shared_data: SharedData) -> None:
        path = shared_data("data/coco_tiny/annotations/instances_train2017.json")
        official = json.loads(path.read_text())["categories"]
        assert [(c.label_id, c.name, c.supercategory) for c in tables.load("coco-instances").classes] == [
            (c["id"], c["name"], c["supercategory"]) for c in official
        ]

    def test_panoptic_is_the_official_file_s(self, shared_data: SharedData) -> None:
        official = json.loads(shared_data("data/coco_panoptic/panoptic_coco_categories.json").read_text())
        found = [
            (c.label_id, c.name, c.supercategory, c.color, c.isthing) for c in tables.load("coco-panoptic").classes
        ]
        assert found == [
            (c["id"], c["name"], c["supercategory"], tuple(c["color"]), c["isthing"] == 1) for c in official
        ]

    def test_panoptic_covers_what_real_annotations_use(self, shared_data: SharedData) -> None:
        examples = json.loads(shared_data("data/coco_panoptic/panoptic_examples.json").read_text())
        used = {s["category_id"] for a in examples["annotations"] for s in a["segments_info"]}
        assert used and used <= {c.label_id for c in tables.load("coco-panoptic").classes}

    def test_instances_are_the_things_of_panoptic(self) -> None:
        things = tuple(c for c in tables.load("coco-panoptic").classes if c.isthing)
        assert tables.load("coco-instances").classes == things

    def test_stuff_stores_the_official_id_minus_one(self) -> None:
        stuff = tables.load("coco-stuff")
        assert {c.label_id + 1 for c in stuff.scored} == set(range(1, 183)) - REMOVED_FROM_COCO
        assert stuff.ignore_ids == (255,)
        things = [(c.label_id + 1, c.name, c.supercategory) for c in stuff.scored if c.isthing]
        assert things == [(c.label_id, c.name, c.supercategory) for c in tables.load("coco-instances").classes]

    def test_stuff_is_in_alphabetical_order_and_has_the_unmerged_stuff_of_panoptic(self) -> None:
        names = {c.label_id + 1: c.name for c in tables.load("coco-stuff").scored if not c.isthing}
        assert len(names) == 91 and list(names.values()) == sorted(names.values())
        unmerged = {c.label_id: c.name for c in tables.load("coco-panoptic").classes if 92 <= c.label_id <= 182}
        assert len(unmerged) == 36 and unmerged.items() <= names.items()

    def test_stuff_has_the_official_numbers_of_supercategories(self) -> None:
        classes = tables.load("coco-stuff").scored
        assert len({c.supercategory for c in classes if c.isthing}) == 12
        assert len({c.supercategory for c in classes if not c.isthing}) == 15


class TestPascal:
    def test_colors_follow_the_bit_trick(self) -> None:
        for c in tables.load("pascal-voc").classes:
            assert c.color == voc_color(c.label_id), c.name

    def test_names_are_those_of_a_published_model(self, shared_data: SharedData) -> None:
        lines = shared_data("weights/coral_deeplab/pascal_voc_segmentation_labels.txt").read_text().splitlines()
        assert [c.name for c in tables.load("pascal-voc").scored] == [x for x in lines if x and " " not in x]

    def test_context_starts_with_voc(self) -> None:
        voc, context = tables.load("pascal-voc").scored, tables.load("pascal-context-60").classes
        assert [(c.label_id, c.name) for c in context[:21]] == [(c.label_id, c.name) for c in voc]

    def test_context_59_and_60_differ_in_the_background_only(self) -> None:
        with_background, without = tables.load("pascal-context-60"), tables.load("pascal-context-59")
        assert with_background.classes[1:] == without.classes[1:]
        assert (with_background.ignore_ids, without.ignore_ids) == ((), (0,))

    def test_from_459_covers_each_of_the_59_once(self) -> None:
        ids = tables.from_459()
        assert sorted(ids.values()) == [c.label_id for c in tables.load("pascal-context-59").scored]

    def test_from_459_keeps_names(self) -> None:
        old, new = tables.load("pascal-context-459"), tables.load("pascal-context-59")
        pairs = {(old.name_of(a).replace(" ", ""), new.name_of(b)) for a, b in tables.from_459().items()}
        renamed = {("table", "diningtable"), ("bedclothes", "bedcloth"), ("cloth", "clothes")}
        assert {(a, b) for a, b in pairs if a != b} == renamed

    def test_from_459_takes_the_ids_of_the_detail_api(self) -> None:
        """The ids that its users write out, e.g. mmsegmentation's tools/dataset_converters/pascal_context.py."""
        official = (
            "2 259 260 415 324 9 258 144 18 19 22 23 397 25 284 158 159 416 33 162 420 454 295 296 427 44 45 46 308 "
            "59 440 445 31 232 65 354 424 68 326 72 458 34 207 80 355 85 347 220 349 360 98 187 104 105 366 189 368 "
            "113 115"
        )
        assert set(tables.from_459()) == {int(i) for i in official.split()}


class TestStreets:
    def test_cityscapes_is_the_official_package_s(self) -> None:
        labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
        found = [
            (c.label_id, c.name, c.color, c.isthing, c.ignore, 255 if c.train_id is None else c.train_id)
            for c in tables.load("cityscapes").classes
        ]
        assert found == [
            (x.id, x.name, x.color, x.hasInstances, x.ignoreInEval, x.trainId) for x in labels if x.id >= 0
        ]
        assert [c.supercategory for c in tables.load("cityscapes").classes] == [x.category for x in labels if x.id >= 0]

    def test_a_real_cityscapes_frame_agrees_in_label_ids_and_train_ids(self, shared_data: SharedData) -> None:
        """Each label id lies under its train id, but for some pixels at borders: the two maps were shrunk apart."""
        folder = shared_data("data/cityscapes_mini/gtFine")
        ids, train_ids = (
            np.array(Image.open(next(folder.rglob(f"frankfurt*_gtFine_{kind}.png"))))
            for kind in ("labelIds", "labelTrainIds")
        )
        to_train = {c.label_id: 255 if c.train_id is None else c.train_id for c in tables.load("cityscapes").classes}
        found = {int(i): int(np.bincount(train_ids[ids == i]).argmax()) for i in np.unique(ids)}
        assert len(found) > 5 and found.items() <= to_train.items()

    def test_kitti_has_cityscapes_labels(self) -> None:
        assert tables.load("kitti") == tables.load("cityscapes")

    def test_bdd100k_sem_has_the_train_ids_and_colors_of_cityscapes(self) -> None:
        ours = [(c.label_id, c.name, c.color, c.isthing) for c in tables.load("bdd100k-sem").scored]
        scored = sorted(tables.load("cityscapes").scored, key=lambda c: c.train_id or 0)
        assert ours == [(c.train_id, c.name, c.color, c.isthing) for c in scored]

    def test_bdd100k_sem_is_in_the_order_of_the_official_config(self, shared_data: SharedData) -> None:
        text = shared_data("data/bdd100k/sem_seg_rle/sem_seg_configs.toml").read_text()
        official = [line.split('"')[1] for line in text.splitlines() if line.startswith("name")]
        assert [c.name for c in tables.load("bdd100k-sem").scored] == official

    def test_bdd100k_pan_maps_to_sem(self) -> None:
        sem = {c.name: (c.label_id, c.color, c.supercategory) for c in tables.load("bdd100k-sem").scored}
        pan = tables.load("bdd100k-pan")
        assert {c.name: (c.train_id, c.color, c.supercategory) for c in pan.classes if c.train_id is not None} == sem
        assert [c.label_id for c in pan.classes if c.isthing] == list(range(31, 41))

    def test_bdd100k_ins_are_the_things_of_sem(self) -> None:
        things = {c.name for c in tables.load("bdd100k-sem").scored if c.isthing}
        ins = tables.load("bdd100k-ins").classes
        assert {c.name for c in ins} == things - {"person"} | {"pedestrian"}
        assert [c.label_id for c in ins] == list(range(1, 9))

    def test_bdd100k_lane_covers_real_label_maps(self, shared_data: SharedData) -> None:
        table = tables.load("bdd100k-lane")
        seen: set[int] = set()
        for path in shared_data("data/bdd100k/lane").rglob("*.png"):
            values = np.unique(np.array(Image.open(path)))
            assert {int(v) for v in values if v & 8} <= set(table.ignore_ids)
            seen |= {int(v & 7) for v in values if not v & 8}
        assert seen and seen <= {c.label_id for c in table.scored}

    def test_camvid_32_agrees_with_the_11_class_layout(self) -> None:
        original = {c.name: c.color for c in tables.load("camvid-32").classes}
        other = {"Pole": "Column_Pole", "Pavement": "Sidewalk", "Unlabelled": "Void"}
        recolored = [c.name for c in camvid.CLASSES.classes if original[other.get(c.name, c.name)] != c.color]
        assert recolored == ["Pavement"]

    def test_camvid_32_takes_its_colors_from_voc(self) -> None:
        first = {voc_color(i) for i in range(64)}
        assert {c.color for c in tables.load("camvid-32").classes} < first


class TestOthers:
    def test_ccp_is_the_official_list(self, shared_data: SharedData) -> None:
        scipy_io = pytest.importorskip("scipy.io")
        official = scipy_io.loadmat(shared_data("data/ccp/label_list.mat"))["label_list"].ravel()
        assert by_name(tables.load("ccp")) == {str(name[0]): i for i, name in enumerate(official)}

    @pytest.mark.parametrize(
        ("label_id", "name", "color", "isthing"),
        [
            (1, "wall", (120, 120, 120), False),
            (13, "person", (150, 5, 61), True),
            (21, "car", (0, 102, 200), True),
            (27, "sea", (9, 7, 230), False),
            (45, "chest of drawers", (6, 51, 255), True),
            (150, "flag", (92, 0, 255), True),
        ],
    )
    def test_ade20k_samples(self, label_id: int, name: str, color: tuple[int, int, int], isthing: bool) -> None:
        """Written out from objectInfo150.txt and color150.mat."""
        assert tables.load("ade20k").classes[label_id] == ClassInfo(label_id, name, color, isthing)

    def test_ade20k_covers_real_label_maps(self, shared_data: SharedData) -> None:
        known = {c.label_id for c in tables.load("ade20k").classes}
        for path in shared_data("data/ade20k/sampleData/annotations").iterdir():
            assert set(np.unique(np.array(Image.open(path))).tolist()) <= known

    def test_ade20k_has_100_things(self) -> None:
        assert sum(c.isthing for c in tables.load("ade20k").classes) == 100

    def test_small_tables(self) -> None:
        assert by_name(tables.load("lits")) == {"background": 0, "liver": 1, "lesion": 2}
        assert by_name(tables.load("pratheepan")) == {"non-skin": 0, "skin": 1}
        assert by_name(tables.load("sku110k")) == {"object": 1}
        assert by_name(tables.load("bdd100k-drivable")) == {"direct": 0, "alternative": 1, "background": 2}
