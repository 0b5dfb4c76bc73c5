"""Tiles, mirrored and scaled views, ensembles, cascades: against plain numpy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import network_checks as check
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from segbatch import api, tables
from segbatch.codecs import columns, png, rle, runlength
from segbatch.config import RunOptions, parse
from segbatch.errors import ConfigError
from segbatch.inference import compose, tiles
from segbatch.inference.options import InferenceOptions
from segbatch.inference.pipeline import Predictor
from segbatch.models import checkpoint
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.base import Detections, InputSpec, ModelSpec, Segmenter
from segbatch.models.network import TorchSegmenter
from segbatch.records import ClassInfo, ClassTable, Prediction

TABLE = ClassTable((ClassInfo(3, "a"), ClassInfo(7, "b"), ClassInfo(900, "c")))
RAW = InputSpec(layout="nhwc", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Given:
    """A source of a segmenter that is there already."""

    segmenter: Any
    name: str = "given"

    @property
    def reference(self) -> str:
        return self.name

    def describe(self) -> ModelSpec:
        spec: ModelSpec = self.segmenter.spec
        return spec

    def load(self, threads: int) -> Segmenter:
        segmenter: Segmenter = self.segmenter
        return segmenter


class Function:
    """A network that is a function of the batch."""

    def __init__(self, function: Any, **changes: Any) -> None:
        self.spec = replace(ModelSpec("f", "semantic", TABLE, RAW, "logits", "d"), **changes)
        self._function = function

    def forward(self, batch: NDArray[Any]) -> Any:
        return self._function(batch)


def colours(batch: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(batch, -1, 1) * 10)


def photo(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(coarse, np.ones((7, 7, 1), np.uint8))[:height, :width])


def viewed(*segmenters: Any, **options: Any) -> Predictor:
    source = compose.ViewsSource(tuple(map(Given, segmenters)), parse(InferenceOptions, options, "test"))
    return Predictor(source.load(1), 1)


def semantic(found: Prediction) -> NDArray[np.uint16]:
    assert found.semantic is not None
    return found.semantic


# -- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("length", "tile", "overlap", "grid"),
    [(1000, 256, 64, 64), (257, 256, 64, 64), (500, 100, 9, 64), (90, 100, 10, 64), (1000, 130, 65, 64)],
)
def test_spans_cover_and_their_weights_add_up_to_one(
    length: int, tile: int, overlap: int, grid: int, exact: bool
) -> None:
    found = tiles.spans(length, tile, overlap, grid, exact)
    total = np.zeros(length)
    for one in found:
        assert 0 < one.stop - one.start <= tile and (one.stop - one.start == tile or not exact or length < tile)
        total[one.start : one.stop] += tiles.weights(one)
    assert found[0].start == 0 and found[-1].stop == length
    assert all(one.before >= overlap for one in found[1:])
    if not exact:
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert all(one.start % grid == 0 for one in found) or tile - overlap < grid
    else:
        assert (total > 0).all()


def test_blending_in_bands_is_blending_at_once() -> None:
    rng = np.random.default_rng(0)
    rows, columns = tiles.spans(150, 64, 20, 4, False), tiles.spans(201, 64, 12, 4, True)
    scores = {(r, c): rng.random((r.stop - r.start, c.stop - c.start, 3), np.float32) for r in rows for c in columns}
    wanted = np.zeros((150, 201, 3))
    for (r, c), part in scores.items():
        weighted = part * tiles.weights(r)[:, None, None] * tiles.weights(c)[:, None]
        wanted[r.start : r.stop, c.start : c.stop] += weighted
    got, times = np.zeros((150, 201, 3)), np.zeros((150, 201), int)

    def done(top: int, left: int, part: NDArray[np.float32]) -> None:
        got[top : top + part.shape[0], left : left + part.shape[1]] = part
        times[top : top + part.shape[0], left : left + part.shape[1]] += 1

    tiles.blend(rows, columns, lambda r, c: scores[r, c].copy(), done)
    assert (times == 1).all()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def small_fcn(rgb: NDArray[np.uint8]) -> TorchSegmenter:
    """Three 3x3 convolutions and one pooling: nothing further than 9 pixels away matters. Every class occurs."""
    torch.manual_seed(0)
    layers: list[Any] = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    layers += [torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3, padding=1)]
    net = torch.nn.Sequential(*layers)
    with torch.no_grad():
        logits = net(torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)[None].float())
        layers[-1].bias -= logits.mean((0, 2, 3))
    spec = ModelSpec("net", "semantic", TABLE, replace(RAW, divisor=2), "logits", "d")
    return TorchSegmenter(net, spec)


def test_tiles_give_what_the_whole_photo_gives_within_the_margin() -> None:
    """The network sees 9 pixels around a pixel, up-sampling one more; the overlap's quarter is 16."""
    rgb = photo(0, 300, 430)
    net = small_fcn(rgb)
    whole = Predictor(net, 1).predict(rgb)
    tiled = viewed(net, tile=192, overlap=64).predict(rgb)
    assert (semantic(tiled) == semantic(whole)).mean() > 0.99999
    assert tiled.class_confidence == pytest.approx(whole.class_confidence, abs=1e-4)
    without_margin = viewed(net, tile=192, overlap=0).predict(rgb)
    assert (semantic(without_margin) != semantic(whole)).any()


@pytest.mark.long
def test_tiles_of_a_real_frame_of_2048x1024(shared_data: Callable[[str], Path]) -> None:
    from segbatch.codecs import photo as codec

    path = shared_data("data/cityscapes_frames/frankfurt_000000_000294_leftImg8bit.png")
    rgb, _ = codec.decode(path.read_bytes())
    net = small_fcn(rgb)
    whole = semantic(Predictor(net, 1).predict(rgb))
    tiled = semantic(viewed(net, tile=512, overlap=64).predict(rgb))
    assert whole.shape == (1024, 2048) and len(np.unique(whole)) == 3
    assert (tiled == whole).mean() > 0.99999


def test_a_photo_that_fits_is_one_tile() -> None:
    rgb, seen = photo(1, 50, 60), []
    predictor = viewed(Function(lambda b: seen.append(b.shape) or colours(b)), tile=64, overlap=8)
    predictor.predict(rgb)
    assert seen == [(1, 50, 60, 3)]


def test_networks_of_a_fixed_size_get_full_tiles() -> None:
    seen: list[Any] = []
    fixed = replace(RAW, height=32, width=32, resize="stretch")
    predictor = viewed(Function(lambda b: seen.append(b.shape) or colours(b), input=fixed), tile=32, overlap=8)
    rgb = photo(1, 50, 75)
    np.testing.assert_array_equal(semantic(predictor.predict(rgb)), np.array([3, 7, 900])[rgb.argmax(-1)])
    assert set(seen) == {(1, 32, 32, 3)}


# -- views and ensembles -------------------------------------------------------------------------------------------


def lopsided(batch: NDArray[Any]) -> NDArray[Any]:
    """Not the same for a mirrored photo: logits grow to the right."""
    return (
        colours(batch)
        + np.linspace(0, 4, batch.shape[2], dtype=np.float32) * np.array([1, 0, -1], np.float32)[:, None, None]
    )


def probabilities(rgb: NDArray[np.uint8], function: Any) -> NDArray[Any]:
    logits = torch.from_numpy(function(rgb[None].astype(np.float32) / 255))
    found: NDArray[Any] = torch.softmax(logits, 1)[0].numpy()
    return found


def test_the_mirrored_view_is_averaged_in() -> None:
    rgb = photo(2, 40, 50)
    found = viewed(Function(lopsided), flip=True).predict(rgb)
    mirrored = probabilities(np.ascontiguousarray(rgb[:, ::-1]), lopsided)[..., ::-1]
    mean = (probabilities(rgb, lopsided) + mirrored) / 2
    np.testing.assert_array_equal(semantic(found), np.array([3, 7, 900])[mean.argmax(0)])
    assert found.class_confidence is not None
    assert found.class_confidence[3] == pytest.approx(mean.max(0)[mean.argmax(0) == 0].mean(), rel=1e-4)
    assert (semantic(Predictor(Function(lopsided), 1).predict(rgb)) != semantic(found)).any()


def test_scales_are_averaged() -> None:
    rgb, seen = photo(3, 40, 60), []
    predictor = viewed(Function(lambda b: seen.append(b.shape[1:3]) or colours(b)), scales=[0.5, 1, 1.5])
    found = predictor.predict(rgb)
    assert seen == [(20, 30), (40, 60), (60, 90)]
    import cv2

    parts = []
    for height, width in seen:
        resized = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LINEAR)
        logits = torch.from_numpy(colours(resized[None].astype(np.float32) / 255))
        parts.append(torch.softmax(F.interpolate(logits, size=(40, 60), mode="bilinear"), 1)[0])
    mean = torch.stack(parts).mean(0).numpy()
    agreement = semantic(found) == np.array([3, 7, 900])[mean.argmax(0)]
    assert agreement.mean() > 0.999


def test_an_ensemble_averages_probabilities_whatever_the_order_of_classes() -> None:
    rgb = photo(4, 30, 30)
    turned = ClassTable(TABLE.classes[::-1])
    second = Function(lambda b: np.ascontiguousarray(lopsided(b)[:, ::-1]), classes=turned)
    found = viewed(Function(colours), second).predict(rgb)
    mean = probabilities(rgb, colours) + probabilities(rgb, lopsided)
    np.testing.assert_array_equal(semantic(found), np.array([3, 7, 900])[mean.argmax(0)])


def test_probabilities_and_labels_take_part() -> None:
    rgb = photo(4, 30, 30)
    soft = Function(lambda b: np.exp(colours(b)), output="probabilities")
    labels = Function(lambda b: b.argmax(-1), output="labels")
    wanted = np.array([3, 7, 900])[rgb.argmax(-1)]
    np.testing.assert_array_equal(semantic(Predictor(soft, 1).predict(rgb)), wanted)
    np.testing.assert_array_equal(semantic(viewed(soft, labels).predict(rgb)), wanted)


def test_what_cannot_be_put_together_is_refused() -> None:
    others = ClassTable((ClassInfo(1, "x"),))
    for wrong, said in (
        (Function(colours, classes=others), "are not those of"),
        (Function(colours, classes=ClassTable(())), "are not those of"),
        (Function(colours, output="own"), "cannot be put together"),
    ):
        with pytest.raises(ConfigError, match=said):
            compose.ViewsSource((Given(Function(colours)), Given(wrong)), InferenceOptions()).describe()
    fixed = Function(colours, input=replace(RAW, height=32, width=32, resize="stretch"))
    with pytest.raises(ConfigError, match="other scales"):
        viewed(fixed, scales=[0.5])
    with pytest.raises(ConfigError, match="no score, suppression"):
        compose.ChosenSource(Given(Function(colours)), InferenceOptions(min_score=0.5)).describe()
    with pytest.raises(ConfigError, match="less than twice"):
        parse(InferenceOptions, {"tile": 100, "overlap": 60}, "options")


# -- instances -----------------------------------------------------------------------------------------------------

THINGS = ClassTable((ClassInfo(5, "box", isthing=True), ClassInfo(6, "other", isthing=True)))


def squares(batch: NDArray[Any]) -> list[Detections]:
    """Finds every bright region."""
    import cv2

    found = []
    for image in batch:
        count, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 0.5).astype(np.uint8))
        left, top, wide, tall = stats[1:count, :4].T.astype(np.float32)
        boxes = np.stack([left, top, left + wide, top + tall], 1)
        masks = np.ones((count - 1, 8, 8), np.float32)
        masks[:, :, :2] = 0.2  # the left quarter is not part of it
        found.append(Detections(boxes, np.full(count - 1, 0.9, np.float32), np.zeros(count - 1, np.int64), masks))
    return found


def boxes_photo() -> tuple[NDArray[np.uint8], list[tuple[int, int, int, int]]]:
    rgb = np.zeros((200, 300, 3), np.uint8)
    boxes = [(10, 20, 30, 20), (100, 30, 24, 18), (130, 140, 28, 26), (250, 90, 30, 22), (60, 120, 26, 20)]
    for left, top, wide, tall in boxes:
        rgb[top : top + tall, left : left + wide] = 255
    return rgb, boxes


@pytest.mark.parametrize("options", [{"tile": 128, "overlap": 64}, {"flip": True}, {"scales": [1.0, 2.0]}, {}])
def test_every_object_is_found_once_whatever_the_views(options: dict[str, Any]) -> None:
    rgb, boxes = boxes_photo()
    spec: dict[str, Any] = {"task": "instance", "classes": THINGS, "output": "detections"}
    found = viewed(Function(squares, **spec), **options).predict(rgb).instances
    assert found is not None and len(found) == len(boxes)
    near = {tuple(round(v) for v in i.bbox_xywh) for i in found}
    assert near == set(boxes) and {i.category_id for i in found} == {5}
    one = next(i for i in found if round(i.bbox_xywh[0]) == 250)
    mask = rle.decode(one.counts, 200, 300)
    if options == {"flip": True}:  # the better of two equals: the photo as it is
        assert not mask[100, 252] and mask[100, 275]


def test_limits_of_the_user_reach_the_model() -> None:
    rgb, _ = boxes_photo()
    spec: dict[str, Any] = {"task": "instance", "classes": THINGS, "output": "detections"}
    source = compose.ChosenSource(Given(Function(squares, **spec)), InferenceOptions(top_k=2))
    found = Predictor(source.load(1), 1).predict(rgb).instances
    assert found is not None and len(found) == 2
    assert source.describe().digest != Function(squares, **spec).spec.digest
    none = Predictor(
        compose.ChosenSource(Given(Function(squares, **spec)), InferenceOptions(min_score=0.95)).load(1), 1
    )
    assert none.predict(rgb).instances == ()


# -- cascades ------------------------------------------------------------------------------------------------------


def test_a_cascade_refines_the_detectors_masks() -> None:
    rgb, boxes = boxes_photo()
    rgb[..., 1] = 0
    left, top, wide, _ = boxes[0]
    rgb[top : top + 5, left : left + wide, 1] = 255  # what the segmenter looks for
    two = ClassTable((ClassInfo(0, "background"), ClassInfo(1, "green")))
    detector = Function(squares, task="instance", classes=THINGS, output="detections")
    segmenter = Function(lambda b: (b[..., 1] > 0.5).astype(np.int64), classes=two, output="labels")
    source = compose.CascadeSource(Given(detector), Given(segmenter, "seg"))
    assert source.describe().task == "instance" and source.describe().classes == THINGS
    found = Predictor(source.load(1), 1).predict(rgb).instances
    assert found is not None and len(found) == len(boxes)
    areas = sorted(i.area for i in found)
    assert areas == [0, 0, 0, 0, 5 * wide]
    refined = max(found, key=lambda i: i.area)
    np.testing.assert_array_equal(rle.decode(refined.counts, 200, 300), rgb[..., 1] > 128)


def test_a_cascade_of_semantic_models_labels_what_the_first_finds() -> None:
    rgb, _ = boxes_photo()
    rgb[0, 299, 2] = 255  # the segmenter would take it for c, but the detector sees nothing there
    two = ClassTable((ClassInfo(0, "background"), ClassInfo(1, "organ")))
    detector = Function(lambda b: (b[..., 0] > 0.5).astype(np.int64), classes=two, output="labels")
    segmenter = Function(lambda b: np.where(b[..., 2] > 0.5, 2, 0), output="labels")
    source = compose.CascadeSource(Given(detector), Given(segmenter, "seg"))
    label_map = semantic(Predictor(source.load(1), 1).predict(rgb))
    wanted = np.where((rgb[..., 2] > 128) & (rgb[..., 0] > 128), 900, 3)
    np.testing.assert_array_equal(label_map, wanted)


# -- confidence ----------------------------------------------------------------------------------------------------


def steps(mean: NDArray[Any]) -> NDArray[Any]:
    """Probabilities of the winners, times 255."""
    return 255 * mean.max(0)


def test_confidence_of_a_network_of_an_ensemble_and_of_tiles() -> None:
    rgb = photo(6, 90, 140)
    plain = compose.ChosenSource(Given(Function(colours)), InferenceOptions(confidence=True))
    one = Predictor(plain.load(1), 1).predict(rgb)
    both = viewed(Function(colours), Function(lopsided), confidence=True).predict(rgb)
    tiled = viewed(Function(colours), confidence=True, tile=64, overlap=16).predict(rgb)
    mean = (probabilities(rgb, colours) + probabilities(rgb, lopsided)) / 2
    for found, wanted in ((one, probabilities(rgb, colours)), (both, mean), (tiled, probabilities(rgb, colours))):
        assert found.confidence is not None and found.confidence.dtype == np.uint8
        assert np.abs(found.confidence - steps(wanted)).max() <= 0.51
    assert viewed(Function(colours), Function(lopsided)).predict(rgb).confidence is None


def test_confidence_is_refused_where_there_is_none() -> None:
    boxes = compose.ChosenSource(
        Given(Function(squares, output="detections", task="instance")), InferenceOptions(confidence=True)
    )
    with pytest.raises(ConfigError, match="gives detections, no probability of a pixel"):
        boxes.describe()


@pytest.mark.parametrize("orientation", [1, 6])
def test_confidence_lies_in_the_masks_table_on_the_stored_grid(tmp_path: Path, orientation: int) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(8, 20, 30)).save(tmp_path / "in" / "a.png", exif=exif)
    options = RunOptions.model_validate({"engine": {"kind": "inline"}})
    asked = InferenceOptions(confidence=True)
    reference, out = trained(tmp_path, "net"), tmp_path / "out"
    api.predict(reference, str(tmp_path / "in"), str(out), inference=asked, options=options)
    (batch,) = tables.scan(str(out), "masks")
    (row,) = batch.to_pylist()
    cell, runs = row["confidence"], columns.runs_at(batch.column("semantic"), 0)
    kept = png.decode_labels(cell["png"])
    assert kept is not None and runs is not None
    assert (cell["height"], cell["width"]) == kept.shape == (20, 30)
    label_map = runlength.decode(runs, (20, 30))
    for entry in row["class_confidence"]:
        assert kept[label_map == entry["value"]].mean() / 255 == pytest.approx(entry["mean"], abs=1 / 255)


# -- references ----------------------------------------------------------------------------------------------------


def trained(folder: Path, name: str) -> str:
    net = check.made("unet", width=2, depth=2)
    checkpoint.write(str(folder / name), net, "unet", ARCHITECTURES["unet"].config(width=2, depth=2), TABLE, {})
    return f"unet@{folder / name}"


def test_references_of_ensembles_and_cascades(tmp_path: Path) -> None:
    a, b = trained(tmp_path, "a+1"), trained(tmp_path, "b")
    single = compose.source(a)
    assert single.reference == a and single.describe().output == "logits"
    both = compose.source(f"{a}+{b}")
    assert both.reference == f"{a}+{b}" and both.describe().output == "own"
    assert both.describe().digest != single.describe().digest
    cascade = compose.source(f"cascade:{a},{b}")
    assert cascade.describe().task == "semantic" and cascade.load(1).spec == cascade.describe()
    tiled = compose.source(a, options=InferenceOptions(tile=512))
    assert tiled.describe().digest not in (single.describe().digest, both.describe().digest)
    with pytest.raises(ConfigError, match="names 1 models"):
        compose.source(f"cascade:{a}")
    with pytest.raises(ConfigError, match="takes no tiles"):
        compose.source(f"cascade:{a},{b}", options=InferenceOptions(flip=True))
