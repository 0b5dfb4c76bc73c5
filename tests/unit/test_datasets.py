"""Datasets one by one: official order and ids, label maps bit for bit, and every way in which a tree can be wrong."""

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import cv2
import generators
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from segbatch import plugins, storage
from segbatch.datasets import drawn_shelves, reading, registry
from segbatch.datasets.camvid import CamVid
from segbatch.datasets.image_masks import ImageMasks
from segbatch.datasets.images import Images, list_images
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError
from segbatch.records import ClassTable, PlanItem, Sample

SharedData = Callable[[str], Path]


def items(dataset: CamVid | ImageMasks, root: Path, *splits: str) -> list[PlanItem]:
    return list(dataset.items(Tree.of(str(root)), splits))


def problem(dataset: CamVid | ImageMasks, item: PlanItem) -> DataError:
    with pytest.raises(DataError) as caught:
        list(dataset.read(item))
    return caught.value


def sample(dataset: CamVid | ImageMasks, item: PlanItem) -> Sample:
    (found,) = dataset.read(item)
    return found


class TestRegistry:
    def test_unknown_name_lists_the_known_and_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"'camvit'; did you mean camvid\?.*known: ade20k, .*, sku110k"):
            registry.dataset("camvit")

    def test_auto_says_what_it_saw(self, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text("a,b")
        with pytest.raises(ConfigError, match=r"first files are table\.csv"):
            registry.find("auto", str(tmp_path))
        with pytest.raises(ConfigError, match="does not exist"):
            registry.find("auto", str(tmp_path / "nowhere"))

    def test_auto_refuses_to_choose_between_two(self, tmp_path: Path) -> None:
        generators.image_masks(generators.camvid(tmp_path))
        with pytest.raises(ConfigError, match="looks like camvid and image-masks"):
            registry.find("auto", str(tmp_path))

    def test_an_installed_dataset_joins_by_entry_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Theirs(Images):
            name = "theirs"

        def load(entry: EntryPoint) -> object:
            return Theirs

        entry = EntryPoint("theirs", "their.module:Theirs", registry.ENTRY_POINTS)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else [])
        with pytest.raises(ConfigError, match=r"their\.module:Theirs.*cannot be loaded"):
            registry.dataset("theirs")
        monkeypatch.setattr(EntryPoint, "load", load)
        assert isinstance(registry.dataset("theirs"), Theirs) and "theirs" in registry.names()


class TestCamVid:
    def test_real_validation_set_against_an_independent_reading(self, shared_data: SharedData) -> None:
        root = shared_data("data/camvid")
        found = items(CamVid(), root, "val")
        frames = [Path(line.split()[0]).stem for line in (root / "val.txt").read_text().splitlines()]
        assert [i.sample_id for i in found] == frames and len(frames) == 101
        pixels = np.zeros(12, np.int64)
        for item in found:
            found_sample = sample(CamVid(), item)
            assert found_sample.semantic is not None
            size = (found_sample.height, found_sample.width, found_sample.channels)
            assert size == (360, 480, 3)
            pixels += np.bincount(found_sample.semantic.ravel(), minlength=12)
        maps = [np.array(Image.open(root / "valannot" / f"{frame}.png")) for frame in frames]
        assert pixels.tolist() == [int(sum((m == i).sum() for m in maps)) for i in range(12)]
        assert pixels.sum() == 101 * 360 * 480

    def test_real_splits_videos_and_counts(self, shared_data: SharedData) -> None:
        root = shared_data("data/camvid")
        found = items(CamVid(), root)
        groups = {i.group_id for i in found[:: len(found) // 40]}
        assert CamVid().splits(Tree.of(str(root))) == ("train", "val") and len(found) == 367 + 101
        assert found[0].sample_id == "0001TP_006690" and groups == {"0001TP", "0006R0", "0016E5"}

    def test_classes_are_the_official_eleven_and_void(self) -> None:
        table = CamVid().classes(Tree.of("nowhere"))
        assert len(table.scored) == 11 and table.ignore_ids == (11,)
        assert table.scored[8].name == "Car" and table.scored[8].color == (64, 0, 128)

    def test_frames_that_are_not_listed_do_not_count(self, tmp_path: Path) -> None:
        generators.save(generators.camvid(tmp_path) / "train" / "extra_1.png", generators.photo(1))
        assert len(items(CamVid(), tmp_path, "train")) == 3

    def test_lists_must_be_two_columns_of_their_split_and_name_a_frame_once(self, tmp_path: Path) -> None:
        lines = (generators.camvid(tmp_path) / "train.txt").read_text()
        for text, message in (
            (lines + lines.splitlines()[0], "a second time"),
            ("a.png b.png\n", "line 1 of .*two columns"),
            (lines.replace("trainannot", "valannot"), "line 1 of .*trainannot"),
        ):
            (tmp_path / "train.txt").write_text(text)
            with pytest.raises(ConfigError, match=message):
                items(CamVid(), tmp_path, "train")

    def test_bad_files_are_named(self, tmp_path: Path) -> None:
        root = generators.camvid(tmp_path, frames=1)
        (item,) = items(CamVid(), root, "train")
        label = root / "trainannot" / Path(item.uri).name
        for pixels, code in (
            (generators.labels(0, (1,), (16, 12)).astype(np.uint8), "size-mismatch"),
            (np.full(generators.SIZE, 12, np.uint8), "unknown-label"),
            (generators.labels(0, (1,)), "label-type"),
            (generators.photo(0), "label-type"),
        ):
            generators.save(label, pixels)
            error = problem(CamVid(), item)
            assert error.code == code and str(label) in error.problem and error.fix and error.uri == str(label)
        for content, code in ((b"", "empty-label"), (b"no image", "bad-label"), (label.read_bytes()[:80], "bad-label")):
            label.write_bytes(content)
            assert problem(CamVid(), item).code == code
        label.unlink()
        assert problem(CamVid(), item).code == "missing-label"
        Path(item.uri).unlink()
        assert problem(CamVid(), item).code == "missing-image"

    def test_a_listed_file_that_is_not_there_stays_an_item(self, tmp_path: Path) -> None:
        root = generators.camvid(tmp_path)
        Path(items(CamVid(), root)[1].uri).unlink()
        after = items(CamVid(), root)
        assert len(after) == 6 and after[1].etag.startswith("missing+")


class TestImages:
    def ids(self, source: str | list[str]) -> list[str]:
        return [i.sample_id for i in list_images(source)]

    def test_folder_glob_list_and_single(self, tmp_path: Path) -> None:
        root = generators.images(tmp_path / "root")
        everything = ["more/photo_0.png", "photo_0.png", "photo_1.JPG", "photo_2.bmp"]
        assert self.ids(str(root)) == self.ids(f"{root}/**") == everything
        assert self.ids(f"{root}/*.png") == ["photo_0.png"] and self.ids(f"{root}/*/photo_?.png") == everything[:1]
        assert self.ids(f"{root}/**/photo_0.*") == everything[:2] and self.ids(f"{root}/mo*/*") == everything[:1]
        assert self.ids(f"{root}/photo_1.JPG") == ["photo_1.JPG"]
        (tmp_path / "list.txt").write_text("root/photo_1.JPG\n\nroot/more/photo_0.png\n")
        assert self.ids(str(tmp_path / "list.txt")) == ["photo_1.JPG", "more/photo_0.png"]
        assert self.ids([f"{root}/photo_2.bmp", f"{root}/gone.png"]) == ["photo_2.bmp", "gone.png"]
        assert [i.etag for i in list_images([f"{root}/gone.png"])] == ["missing"]

    def test_a_folder_whose_name_looks_like_a_pattern(self, tmp_path: Path) -> None:
        root = generators.images(tmp_path / "day[1]")
        assert len(self.ids(str(root))) == 4

    def test_wrong_sources_are_refused_at_once(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        photo = str(generators.images(tmp_path / "root") / "photo_0.png")
        (tmp_path / "list.txt").write_text("\n")
        for source, message in (
            (str(empty), "empty holds no image"),
            (f"{tmp_path}/nowhere", "nowhere does not exist"),
            (f"{tmp_path}/nowhere/*.png", "nowhere does not exist"),
            (f"{tmp_path}/nowhere.png", "nowhere.png does not exist"),
            (f"{empty}/*.png", "matches no image"),
            (str(tmp_path / "list.txt"), "is empty"),
            ([photo, photo], "twice"),
        ):
            with pytest.raises(ConfigError, match=message):
                list_images(source)

    def test_a_huge_folder_is_a_stream(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        seen = []

        def endless(root: str, suffixes: tuple[str, ...] = (), recursive: bool = True) -> object:
            for i in range(10**9):
                seen.append(i)
                yield storage.ObjectInfo(f"{root}/{i:09d}.jpg", "e", 1)

        monkeypatch.setattr(storage, "list_files", endless)
        found = list_images(str(tmp_path))
        assert [next(found).sample_id for _ in range(3)][2] == "000000002.jpg" and len(seen) == 3


class TestImageMasks:
    def test_split_files_give_order_and_membership(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path)
        (root / "splits").mkdir()
        (root / "splits" / "val.txt").write_text("val/item_1.png\n")
        (root / "splits" / "train.txt").write_text("train/item_2\ntrain/item_0\n\n")
        found = items(ImageMasks(), root)
        assert [i.sample_id for i in found] == ["train/item_2", "train/item_0", "val/item_1"]
        assert [i.split for i in found] == ["train", "train", "val"]
        (root / "splits" / "val.txt").write_text("train/item_0\n")
        with pytest.raises(ConfigError, match=r"train/item_0 is listed twice, in splits/train.txt and splits/val.txt"):
            items(ImageMasks(), root)

    def test_incomplete_pairs_stay_items_with_a_reason(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path)
        (root / "masks" / "val" / "item_1.png").unlink()
        (root / "images" / "train" / "item_0.png").unlink()
        found = {i.sample_id: i for i in items(ImageMasks(), root)}
        assert len(found) == 6
        assert problem(ImageMasks(), found["val/item_1"]).code == "missing-label"
        assert problem(ImageMasks(), found["train/item_0"]).code == "missing-image"

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_grey_masks_of_every_depth_keep_their_numbers(self, tmp_path: Path, bits: int) -> None:
        wanted = generators.labels(5, tuple(range(min(2**bits, 300))))
        path = tmp_path / "mask.png"
        path.write_bytes(_grey_png(wanted, bits))
        assert np.array_equal(reading.read_label(str(path)), wanted)

    def test_palette_masks_give_their_indices(self, tmp_path: Path) -> None:
        wanted = generators.labels(6, (0, 1, 2)).astype(np.uint8)
        image = Image.fromarray(wanted, "L").convert("P")
        image.putdata(wanted.ravel().tolist())
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 255])
        image.save(tmp_path / "mask.png")
        assert np.array_equal(reading.read_label(str(tmp_path / "mask.png")), wanted)

    def test_colour_masks_are_decoded_by_the_classes(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path, count=1, splits=("train",))
        (item,) = items(ImageMasks(), root)
        wanted = generators.labels(7, (0, 3, 900))
        table = {0: (10, 20, 30), 3: (200, 0, 0), 900: (0, 0, 255)}
        colours = np.array([[table[int(v)] for v in row] for row in wanted], np.uint8)
        mask = root / "masks" / "train" / "item_0.png"
        generators.save(mask, colours)
        assert np.array_equal(np.asarray(sample(ImageMasks(), item).semantic), wanted)
        colours[3, 5] = (1, 2, 3)
        generators.save(mask, colours)
        error = problem(ImageMasks(), item)
        assert error.code == "unknown-color" and "(1, 2, 3) at row 3, column 5" in error.problem

    def test_unknown_ids_are_named_with_their_place_and_accepted_without_classes(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path, count=1, splits=("train",))
        mask = np.zeros(generators.SIZE, np.uint8)
        mask[2, 7:9] = 77
        generators.save(root / "masks" / "train" / "item_0.png", mask)
        error = problem(ImageMasks(), items(ImageMasks(), root)[0])
        assert (
            error.code == "unknown-label" and "id 77 at row 2, column 7" in error.problem and "2 such" in error.problem
        )
        (root / "classes.toml").unlink()
        assert np.array_equal(np.asarray(sample(ImageMasks(), items(ImageMasks(), root)[0]).semantic), mask)
        assert ImageMasks().classes(Tree.of(str(root))) == ClassTable(())

    def test_class_files_of_three_kinds_agree(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path)
        from_toml = ImageMasks().classes(Tree.of(str(root)))
        assert [c.label_id for c in from_toml.classes] == [0, 3, 900, 255] and from_toml.ignore_ids == (255,)
        (root / "classes.toml").unlink()
        (root / "classes.json").write_text(
            '[{"id": 0, "name": "floor", "color": [10, 20, 30]}, {"id": 3, "name": "cart", "color": [200, 0, 0]},'
            '{"id": 900, "name": "person", "color": [0, 0, 255]}, {"id": 255, "name": "void", "ignore": true}]'
        )
        assert ImageMasks().classes(Tree.of(str(root))) == from_toml
        (root / "classes.json").unlink()
        (root / "classes.txt").write_text("floor\nshopping cart\n")
        assert [(c.label_id, c.name) for c in ImageMasks().classes(Tree.of(str(root))).classes] == [
            (0, "floor"),
            (1, "shopping cart"),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[[classes]]\nid = 0\nname = "a"\ncolour = [1, 2, 3]', "unknown key classes.0.colour; did you mean color"),
            ('[[classes]]\nid = 70000\nname = "a"', "classes.0.id = 70000"),
            ('[[classes]]\nid = 0\nname = "a"\n[[classes]]\nid = 0\nname = "b"', "uses the id 0 for several"),
            ("classes = []", "classes"),
            ("[[classes", "cannot be read"),
        ],
    )
    def test_wrong_class_files_are_refused(self, tmp_path: Path, text: str, message: str) -> None:
        root = generators.image_masks(tmp_path)
        (root / "classes.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            items(ImageMasks(), root)

    def test_two_class_files_and_two_photos_of_one_stem_are_refused(self, tmp_path: Path) -> None:
        root = generators.image_masks(tmp_path)
        (root / "classes.txt").write_text("a\n")
        with pytest.raises(ConfigError, match=r"classes.toml and classes.txt"):
            items(ImageMasks(), root)
        (root / "classes.txt").unlink()
        generators.save(root / "images" / "train" / "item_0.jpg", generators.photo(0))
        with pytest.raises(ConfigError, match="same stem"):
            items(ImageMasks(), root)


def _grey_png(values: NDArray[np.uint16], bits: int) -> bytes:
    """A grey PNG of any bit depth, written by OpenCV (8, 16 bit) or by hand from the specification."""
    import struct
    import zlib

    if bits >= 8:
        return bytes(cv2.imencode(".png", values.astype(np.uint8 if bits == 8 else np.uint16))[1].tobytes())
    height, width = values.shape
    digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(digits.reshape(height, width * bits).astype(np.uint8), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 drawn shelves, 120 to train and 30 to validate."""
    root = tmp_path_factory.mktemp("shelves")
    drawn_shelves.draw(str(root), count=150)
    return root


class TestDrawnShelves:
    @pytest.mark.long
    def test_it_is_a_clean_image_masks_tree(self, tree: Path) -> None:
        assert registry.find("auto", str(tree))[0].name == "image-masks"
        found = items(ImageMasks(), tree)
        assert [len(items(ImageMasks(), tree, s)) for s in ("train", "val")] == [120, 30] and len(found) == 150
        maps = [np.asarray(sample(ImageMasks(), i).semantic) for i in found]
        pixels = np.bincount(np.concatenate(maps).ravel(), minlength=6) / (150 * 192 * 256)
        assert pixels[:5].min() > 0.04 and 0 < pixels[5] < 0.05
        assert all({0, 1, 2, 3} <= set(np.unique(m).tolist()) for m in maps)

    @pytest.mark.long
    def test_the_same_seed_draws_the_same_bytes_and_more_photos_leave_the_first_alone(
        self, tree: Path, tmp_path: Path
    ) -> None:
        drawn_shelves.draw(str(tmp_path / "again"), count=5)
        drawn_shelves.draw(str(tmp_path / "other"), count=5, seed=1)
        for path in sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("shelf_*")):
            assert (tmp_path / "again" / path).read_bytes() == (tree / path).read_bytes()
            assert (tmp_path / "other" / path).read_bytes() != (tree / path).read_bytes()

    def test_colour_alone_cannot_tell_the_classes(self, tree: Path) -> None:
        counts = np.zeros((32**3, 5), np.int64)
        for bins, truth in _pixels(tree, "train", 100):
            np.add.at(counts, (bins, truth), 1)
        classifier = np.where(counts.any(axis=1), counts.argmax(axis=1), counts.sum(axis=0).argmax())
        confusion = np.zeros((5, 5), np.int64)
        for bins, truth in _pixels(tree, "val", 30):
            np.add.at(confusion, (truth, classifier[bins]), 1)
        hits = np.diag(confusion)
        assert np.mean(hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)) < 0.4

    @pytest.mark.parametrize(("count", "height"), [(0, 192), (1, 32)])
    def test_impossible_requests_are_refused(self, tmp_path: Path, count: int, height: int) -> None:
        with pytest.raises(ValueError, match="cannot draw"):
            drawn_shelves.draw(str(tmp_path), count=count, height=height)

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (120, 320), (480, 640)])
    def test_any_size_can_be_drawn(self, height: int, width: int) -> None:
        for seed in range(4):
            photo, mask, _, _ = drawn_shelves.shelf(np.random.default_rng(seed), height, width)
            assert photo.shape == (height, width, 3) and mask.shape == (height, width) and mask.max() <= 5


def _pixels(tree: Path, split: str, count: int) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """(colour bin of 32 x 32 x 32, label id) of every pixel that is not void, by photo."""
    pairs = []
    for path in sorted((tree / "images" / split).iterdir())[:count]:
        rgb = np.array(Image.open(path)).astype(np.int64) >> 3
        truth = np.array(Image.open(tree / "masks" / split / f"{path.stem}.png"))
        bins = (rgb[..., 0] * 32 + rgb[..., 1]) * 32 + rgb[..., 2]
        pairs.append((bins[truth < 5], truth[truth < 5]))
    return pairs
