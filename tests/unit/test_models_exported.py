"""ONNX, TorchScript and pt2 files, made here, against the network they were made from."""

import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import network_checks as checks
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from segbatch.errors import ConfigError, DataError
from segbatch.inference.pipeline import Predictor
from segbatch.models import checkpoint, pt2_program, registry
from segbatch.models.architectures import ARCHITECTURES

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_files as onnx

DIM = torch.export.Dim
IMAGENET = "mean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n"
PLAIN = "mean = [0, 0, 0]\nstd = [1, 1, 1]\n"
NAMES = 'classes = ["sky", "road", "sign"]\nlabel_ids = [7, 2, 900]\n'
SUFFIX = {"onnx": "onnx", "torchscript": "pt", "pt2": "pt2"}


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Coarse noise, so that neighbouring pixels mostly agree."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width]


def put(folder: Path, kind: str, data: bytes, side_car: str = "", name: str = "net") -> str:
    """A file with its side-car; gives the reference."""
    path = folder / f"{name}.{SUFFIX[kind]}"
    path.write_bytes(data)
    if side_car:
        (folder / f"{path.name}.toml").write_text(side_car)
    return f"{kind}:{path}"


def predictor(reference: str, batch_size: int = 2, classes_uri: str = "") -> Predictor:
    return Predictor(registry.source(reference, classes_uri).load(1), batch_size)


def label_maps(reference: str, photos: list[NDArray[np.uint8]], batch_size: int = 2) -> list[Any]:
    model = predictor(reference, batch_size)
    found = [model.finish(r) for r in model.forward([model.prepare(p) for p in photos])]
    return [f.semantic for f in found]


def scripted(net: nn.Module, example: Tensor | None = None, **extra: str) -> bytes:
    """TorchScript: traced with an example, else compiled."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(net.eval()) if example is None else torch.jit.trace(net.eval(), example)  # type: ignore[no-untyped-call]
        torch.jit.save(made, buffer, _extra_files={k.replace("__", "."): v for k, v in extra.items()})
    return buffer.getvalue()


def exported(net: nn.Module, example: Tensor, free: Any = None, **extra: str) -> bytes:
    """pt2; ``free`` is the example's dynamic shape."""
    program = torch.export.export(net.eval(), (example,), dynamic_shapes=None if free is None else (free,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={k.replace("__", "."): v for k, v in extra.items()})
    return buffer.getvalue()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References of one U-Net as a checkpoint, TorchScript, pt2 and ONNX, all of any size and batch."""
    folder = tmp_path_factory.mktemp("four")
    options = {"width": 4, "depth": 2}
    net = checks.made("unet", seed=3, **options)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 2)
    checkpoint.write(str(folder / "unet"), net, "unet", ARCHITECTURES["unet"].config(**options), checks.CLASSES, {})
    example = torch.rand(2, 3, 32, 48)
    free = {0: DIM.DYNAMIC, 2: 2 * DIM("h"), 3: 2 * DIM("w")}
    files = {
        "torchscript": scripted(net, example),
        "pt2": exported(net, example, free),
        "onnx": onnx.unet(net),
    }
    said = {"pt2": ""}
    references = {k: put(folder, k, v, IMAGENET + NAMES + said.get(k, "divisor = 2\n")) for k, v in files.items()}
    return {"checkpoint": f"unet@{folder / 'unet'}", **references}


def agree(four: dict[str, str], photos: list[NDArray[np.uint8]]) -> None:
    wanted = label_maps(four["checkpoint"], photos)
    assert {i for m in wanted for i in np.unique(m).tolist()} == {7, 2, 900}
    for kind in SUFFIX:
        for found, expected in zip(label_maps(four[kind], photos, batch_size=3), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.long
def test_four_files_of_one_network_give_the_same_labels(four: dict[str, str]) -> None:
    agree(four, [photo(61, 83), photo(64, 40, 1), photo(61, 83, 2), photo(33, 120, 3), photo(61, 83, 4)])


@pytest.mark.long
def test_four_files_give_the_same_labels_on_real_photos(
    four: dict[str, str], shared_data: Callable[[str], Path]
) -> None:
    paths = [next(shared_data("data/camvid").rglob("*.png")), shared_data("data/ccp/photos/0001.jpg")]
    agree(four, [np.asarray(Image.open(p).convert("RGB"))[40:301, 60:343] for p in paths])


def test_what_they_say_of_themselves(four: dict[str, str]) -> None:
    specs = {kind: registry.source(four[kind]).describe() for kind in SUFFIX}
    for kind, spec in specs.items():
        assert (spec.name, spec.task, spec.output) == (four[kind], "semantic", "logits")
        assert [(c.label_id, c.name) for c in spec.classes.classes] == [(7, "sky"), (2, "road"), (900, "sign")]
        assert (spec.input.divisor, spec.input.resize, spec.input.layout) == (2, "none", "nchw")
        copied = pickle.loads(pickle.dumps(registry.source(four[kind])))
        assert copied.describe() == spec == copied.load(1).spec
    assert len({s.digest for s in specs.values()}) == 3


def test_several_threads_may_run_them(four: dict[str, str]) -> None:
    photos = [photo(40, 52, seed) for seed in range(8)]
    for kind in SUFFIX:
        model = predictor(four[kind], 1)
        alone = [model.predict(p).semantic for p in photos]
        with ThreadPoolExecutor(4) as pool:
            for together, expected in zip(pool.map(model.predict, photos), alone, strict=True):
                np.testing.assert_array_equal(together.semantic, expected)


# --- what the side-car decides, for all three


class Squares(nn.Module):
    """Three scores of a pixel: its channels, squared."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.fixture(scope="module")
def squares() -> dict[str, bytes]:
    example = torch.rand(2, 3, 8, 8)
    free = {0: DIM("n", min=1, max=2), 2: DIM.DYNAMIC, 3: DIM.DYNAMIC}
    return {
        "onnx": onnx.file([onnx.node("Mul", ["photo", "photo"], "scores")], {"scores": (onnx.FLOAT, onnx.FREE)}),
        "torchscript": scripted(Squares()),
        "pt2": exported(Squares(), example, free),
    }


@pytest.mark.parametrize("kind", SUFFIX)
class TestSideCar:
    def test_normalisation_must_be_said_and_the_error_shows_how(
        self, kind: str, squares: dict[str, bytes], tmp_path: Path
    ) -> None:
        reference = put(tmp_path, kind, squares[kind])
        with pytest.raises(ConfigError, match="does not say how photos are normalised") as caught:
            registry.source(reference).describe()
        assert "\n" not in str(caught.value)
        path, lines = re.findall(r"write two lines into (\S+): (.*?) \(ImageNet's\)", str(caught.value))[0]
        Path(path).write_text(lines.replace(" and ", "\n"))
        spec = registry.source(reference).describe()
        assert (spec.input.mean, spec.input.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert spec.classes.classes == ()

    def test_it_decides_the_digest(self, kind: str, squares: dict[str, bytes], tmp_path: Path) -> None:
        digests = [
            registry.source(put(tmp_path, kind, squares[kind], text)).describe().digest
            for text in (
                *(PLAIN, IMAGENET, PLAIN + "divisor = 4", PLAIN + NAMES, PLAIN + 'channel_order = "bgr"'),
                *(PLAIN + 'output = "probabilities"', PLAIN + "fill = 114", PLAIN + 'licence = "MIT"'),
            )
        ]
        assert len(set(digests)) == 7 and digests[-1] == digests[0]

    def test_channel_order_and_fill(self, kind: str, squares: dict[str, bytes], tmp_path: Path) -> None:
        rgb = photo(9, 10)
        side_car = "mean = [0.5, 0.25, 0]\nstd = [0.5, 1, 1]\ndivisor = 8\n"
        wanted = ((rgb / 255 - [0.5, 0.25, 0]) / [0.5, 1, 1]) ** 2
        for more, order, edge in (
            ("", [0, 1, 2], [0, 0, 0]),
            ('channel_order = "bgr"\n', [2, 1, 0], [0, 0, 0]),
            ("fill = 51\n", [0, 1, 2], [((0.2 - 0.5) / 0.5) ** 2, (0.2 - 0.25) ** 2, 0.04]),
        ):
            model = predictor(put(tmp_path, kind, squares[kind], side_car + more))
            [raw] = model.forward([model.prepare(rgb)])
            assert raw.output.shape == (3, 16, 16)
            np.testing.assert_allclose(raw.output[:, :9, :10], np.moveaxis(wanted, -1, 0)[order], atol=1e-6)
            np.testing.assert_allclose(raw.output[:, 12, 12], np.array(edge)[order], atol=1e-6)

    def test_batches_of_any_number(self, kind: str, squares: dict[str, bytes], tmp_path: Path) -> None:
        segmenter = registry.source(put(tmp_path, kind, squares[kind], PLAIN)).load(1)
        batch = np.random.default_rng(0).random((5, 3, 8, 6), np.float32)
        untouched = batch.copy()
        for count in (1, 2, 5):
            np.testing.assert_array_equal(segmenter.forward(batch[:count]), untouched[:count] ** 2)

    def test_classes_come_from_the_user_then_the_side_car(
        self, kind: str, squares: dict[str, bytes], tmp_path: Path
    ) -> None:
        reference = put(tmp_path, kind, squares[kind], PLAIN + NAMES)
        (tmp_path / "own.txt").write_text("x\ny\nz\n")
        (tmp_path / "two.txt").write_text("x\ny\n")
        named = registry.source(reference, f"{tmp_path}/own.txt").describe()
        assert [c.name for c in named.classes.classes] == ["x", "y", "z"]
        with pytest.raises(ConfigError, match=r"two.txt names 2 classes, .* has 3 outputs"):
            registry.source(reference, f"{tmp_path}/two.txt").describe()
        with pytest.raises(ConfigError, match=r"toml names 1 classes, .* has 3 outputs"):
            registry.source(put(tmp_path, kind, squares[kind], PLAIN + 'classes = ["a"]')).describe()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('task = "instance"', "task is instance, but .* gives logits: semantic"),
            ("min_score = 0.5", "min_score cannot be chosen"),
            ("meen = [0, 0, 0]", "did you mean mean"),
            ('output = "labels"', 'its outputs are .* which cannot be output = "labels"'),
            ("mean = [123, 116, 103]", "less than or equal to 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, kind: str, text: str, words: str, squares: dict[str, bytes], tmp_path: Path
    ) -> None:
        normalised = "" if text.startswith("mean") else PLAIN
        with pytest.raises(ConfigError, match=words):
            registry.source(put(tmp_path, kind, squares[kind], normalised + text)).describe()

    def test_files_of_another_kind(self, kind: str, squares: dict[str, bytes], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            registry.source(f"{kind}:{tmp_path}/none").describe()
        other = squares["pt2" if kind != "pt2" else "torchscript"]
        for data in (b"", b"not a network", squares[kind][: len(squares[kind]) // 2], other):
            with pytest.raises(ConfigError, match=r"cannot be opened|not a file that torch|not a TorchScript|laid out"):
                registry.source(put(tmp_path, kind, data, PLAIN)).describe()


# --- shapes


def test_uint8_photos_of_a_fixed_size_to_labels(tmp_path: Path) -> None:
    """Channels last, batch 1: TensorFlow's way."""
    nodes = [
        onnx.node("Cast", ["photo"], "floats", to=onnx.FLOAT),
        onnx.node("ArgMax", ["floats"], "labels", axis=3, keepdims=0),
    ]
    for batch in (1, 4):
        data = onnx.file(nodes, {"labels": (onnx.INT64, (batch, 6, 9))}, photo=(onnx.UINT8, (batch, 6, 9, 3)))
        reference = put(tmp_path, "onnx", data)
        spec = registry.source(reference).describe()
        assert (spec.output, spec.input.dtype, spec.input.layout) == ("labels", "uint8", "nhwc")
        assert (spec.input.height, spec.input.width, spec.input.resize) == (6, 9, "stretch")
        photos = [photo(6, 9, seed) for seed in range(5)]
        for found, rgb in zip(label_maps(reference, photos, batch_size=5), photos, strict=True):
            np.testing.assert_array_equal(found, rgb.argmax(-1))
    with pytest.raises(ConfigError, match=r"height is 8, but .* wants 6"):
        registry.source(put(tmp_path, "onnx", data, "height = 8")).describe()
    with pytest.raises(ConfigError, match=r"resize is none, but .* wants 6 x 9"):
        registry.source(put(tmp_path, "onnx", data, 'resize = "none"')).describe()
    spec = registry.source(put(tmp_path, "onnx", data, 'resize = "letterbox"')).describe()
    assert spec.input.resize == "letterbox"


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 4, 6), (2, 4, 6, 1)])
def test_labels_with_and_without_a_channel(tmp_path: Path, shape: tuple[int, ...]) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 6))
    last = shape[-1] == 1
    data = onnx.constant_outputs({"labels": labels.reshape(shape)}, (4, 6), batch=2, last=last)
    out = registry.source(put(tmp_path, "onnx", data, PLAIN)).load(1)
    fed = np.zeros((2, 4, 6, 3) if last else (2, 3, 4, 6), np.float32)
    np.testing.assert_array_equal(out.forward(fed), labels)


def test_one_output_is_the_foreground(tmp_path: Path) -> None:
    top = [onnx.node("ReduceMax", ["photo"], "scores", axes=[1], keepdims=1)]
    data = onnx.file(top, {"scores": (onnx.FLOAT, ("n", 1, "h", "w"))})
    model = predictor(put(tmp_path, "onnx", data, PLAIN))
    assert [c.name for c in model.spec.classes.classes] == ["background", "foreground"]
    rgb = photo(8, 12) // 2 + photo(8, 12, 1) // 4
    found = model.predict(rgb)
    probability = rgb.max(-1) / 255
    np.testing.assert_array_equal(found.semantic, probability > 0.5)
    assert found.class_confidence is not None
    assert found.class_confidence[1] == pytest.approx(probability[probability > 0.5].mean(), rel=1e-4)
    side_car = "mean = [0.5, 0.5, 0.5]\nstd = [0.1, 0.1, 0.1]\n"
    with pytest.raises(DataError, match=r'no probabilities.*output = "logits"'):
        predictor(put(tmp_path, "onnx", data, side_car)).predict(rgb)
    model = predictor(put(tmp_path, "onnx", data, side_car + 'output = "logits"'))
    np.testing.assert_array_equal(model.predict(rgb).semantic, probability > 0.5)


def test_probabilities_and_channels_last(tmp_path: Path) -> None:
    nodes = [onnx.node("Softmax", ["photo"], "scores", axis=3)]
    shape = ("n", "h", "w", 3)
    data = onnx.file(nodes, {"scores": (onnx.FLOAT, shape)}, photo=(onnx.FLOAT, shape))
    model = predictor(put(tmp_path, "onnx", data, PLAIN + 'scores = "probabilities"'))
    assert (model.spec.output, model.spec.input.layout) == ("probabilities", "nhwc")
    rgb = photo(8, 12)
    found = model.predict(rgb)
    np.testing.assert_array_equal(found.semantic, rgb.argmax(-1))
    shares = np.exp(rgb / 255) / np.exp(rgb / 255).sum(-1, keepdims=True)
    wanted = {k: shares.max(-1)[rgb.argmax(-1) == k].mean() for k in range(3)}
    assert found.class_confidence == pytest.approx(wanted, rel=1e-5)


def test_outputs_that_are_not_declared_are_tried(tmp_path: Path) -> None:
    spec = registry.source(put(tmp_path, "onnx", onnx.scaled(shape=None), PLAIN)).describe()
    assert spec.output == "logits"
    nodes = [onnx.node("Reshape", ["photo", "shape"], "flat")]
    data = onnx.file(nodes, {"flat": (onnx.FLOAT, None)}, {"shape": np.array([0, -1])})
    with pytest.raises(ConfigError, match=r"its outputs are flat float \(1, 18432\) \(understood are scores"):
        registry.source(put(tmp_path, "onnx", data, PLAIN)).describe()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (onnx.scaled(photo=(onnx.FLOAT, ("n", 4, "h", "w")), shape=None), r"float32 of shape \(\?, 4, \?, \?\)"),
        (onnx.scaled(photo=(onnx.FLOAT, (1, 3, 64, "w")), shape=None), "one side of any size"),
        (
            onnx.file(
                [onnx.node("Add", ["photo", "other"], "scores")],
                {"scores": (onnx.FLOAT, onnx.FREE)},
                more_inputs=["other"],
            ),
            "has 2 inputs: photo, other",
        ),
    ],
)
def test_inputs_of_another_kind(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.source(put(tmp_path, "onnx", data, PLAIN)).describe()


def test_a_size_that_does_not_fit_is_one_photos_error(four: dict[str, str], tmp_path: Path) -> None:
    for kind in SUFFIX:
        if kind == "pt2":
            continue
        data = Path(four[kind].partition(":")[2]).read_bytes()
        model = predictor(put(tmp_path, kind, data, IMAGENET))
        with pytest.raises(DataError, match=r"cannot be run on an input of 7 x 9: .*write divisor"):
            model.predict(photo(7, 9))
        assert model.predict(photo(8, 10)).semantic is not None


# --- ONNX alone


def test_metadata_takes_the_place_of_the_side_car(tmp_path: Path) -> None:
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "classes": ["a", "b", "c"], "licence": "MIT"}
    data = onnx.scaled(metadata={"segbatch.json": json.dumps(own)})
    spec = registry.source(put(tmp_path, "onnx", data)).describe()
    assert (spec.input.mean, spec.licence) == ((0.5, 0.5, 0.5), "MIT")
    assert [c.name for c in spec.classes.classes] == ["a", "b", "c"]
    spec = registry.source(put(tmp_path, "onnx", data, 'mean = [0, 0, 0]\nclasses = ["x", "y", "z"]')).describe()
    assert (spec.input.mean, spec.input.std) == ((0, 0, 0), (0.5, 0.5, 0.5))
    assert [c.name for c in spec.classes.classes] == ["x", "y", "z"]
    wrong = onnx.scaled(metadata={"segbatch.json": '{"classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}'})
    with pytest.raises(ConfigError, match=r"names 1 classes, .* has 3 outputs"):
        registry.source(put(tmp_path, "onnx", wrong, name="wrong")).describe()


def test_names_in_metadata_are_read_and_never_run(tmp_path: Path) -> None:
    names = "{0: 'person', 1: \"bus's\", 2: 'tie'}"
    spec = registry.source(put(tmp_path, "onnx", onnx.scaled(metadata={"names": names}), PLAIN)).describe()
    assert [c.name for c in spec.classes.classes] == ["person", "bus's", "tie"]
    mark = tmp_path / "mark"
    evil = f"{{0: open({str(mark)!r}, 'w'), 1: 'b', 2: 'c'}}"
    with pytest.raises(ConfigError, match="names is neither JSON nor a literal"):
        registry.source(put(tmp_path, "onnx", onnx.scaled(metadata={"names": evil}), PLAIN)).describe()
    assert not mark.exists()


def test_weights_outside_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx as package

    model = package.load_model_from_string(onnx.scaled())
    [factor] = model.graph.initializer
    (tmp_path / "factor.bin").write_bytes(factor.raw_data)
    factor.ClearField("raw_data")
    factor.data_location = package.TensorProto.EXTERNAL
    factor.external_data.add(key="location", value="factor.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="write the weights into the file itself"):
        registry.source(put(tmp_path, "onnx", model.SerializeToString(), PLAIN)).describe()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'segbatch\[onnx\]'"):
        registry.source(put(tmp_path, "onnx", onnx.scaled(), PLAIN)).describe()


# --- TorchScript alone


class Named(nn.Module):
    """torchvision's way of giving several results."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"aux": x[:, :1], "out": x}


class Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[:, :1]


class Fixed(nn.Module):
    """Takes one photo of 8 x 12, whatever it is fed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x[:1], size=(8, 12))


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "/tmp/never-written-by-segbatch")
        return x


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("/etc/hostname", size=1)


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
@pytest.mark.parametrize("net", [Named(), Several()])
def test_dictionaries_and_tuples(tmp_path: Path, kind: str, net: nn.Module) -> None:
    if kind == "torchscript":
        data = scripted(net)
    else:
        data = exported(net, torch.rand(2, 3, 8, 8), {0: DIM.DYNAMIC, 2: DIM.DYNAMIC, 3: DIM.DYNAMIC})
    rgb = photo(9, 14)
    [found] = label_maps(put(tmp_path, kind, data, PLAIN), [rgb])
    np.testing.assert_array_equal(found, rgb.argmax(-1))


def test_a_fixed_size_must_be_said(tmp_path: Path) -> None:
    data = scripted(Fixed())
    with pytest.raises(ConfigError, match="maps of 8 x 8 for an input of 64 x 96, which do not follow its size"):
        registry.source(put(tmp_path, "torchscript", scripted(SquareFixed()), PLAIN)).describe()
    reference = put(tmp_path, "torchscript", data, PLAIN + "height = 8\nwidth = 12")
    spec = registry.source(reference).describe()
    assert (spec.input.height, spec.input.width, spec.input.resize) == (8, 12, "stretch")
    photos = [photo(8, 12, seed) for seed in range(3)]
    for found, rgb in zip(label_maps(reference, photos, batch_size=3), photos, strict=True):
        np.testing.assert_array_equal(found, rgb.argmax(-1))


class SquareFixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size=(8, 8))


@pytest.mark.parametrize(("net", "word"), [(Writing(), "save"), (Reading(), "from_file")])
def test_torchscript_that_touches_files_is_refused(tmp_path: Path, net: nn.Module, word: str) -> None:
    with pytest.raises(ConfigError, match=f"code/.* says {word}"):
        registry.source(put(tmp_path, "torchscript", scripted(net), PLAIN)).describe()
    assert not os.path.exists("/tmp/never-written-by-segbatch")


def rewritten(data: bytes, change: Callable[[str, bytes], bytes | None], more: dict[str, bytes] | None = None) -> bytes:
    """A torch archive with members changed, taken out (None) and added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in (more or {}).items():
            new.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("code/more.py", b"x = ops.evil.run(x)", "ops.evil"),
        ("code/more.py", b'x = getattr(torch, "s\\x61ve")', "getattr"),
        ("CODE/MORE.PY", b"(x).save(1)", "says save"),
        ("more.pkl", b"c__torch__.torch.classes.evil\nThing\n", "torch.classes.evil"),
    ],
)
def test_torchscript_of_other_libraries_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    data = rewritten(scripted(Squares()), lambda _, c: c, {name: content})
    with pytest.raises(ConfigError, match=words):
        registry.source(put(tmp_path, "torchscript", data, PLAIN)).describe()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    data = rewritten(scripted(Squares()), lambda _, c: c, {"VERSION": b"3"})
    with pytest.raises(ConfigError, match="several members of one name"):
        registry.source(put(tmp_path, "torchscript", data, PLAIN)).describe()


def test_extra_files_take_the_place_of_the_side_car(tmp_path: Path) -> None:
    own = json.dumps({"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "classes": ["a", "b", "c"]})
    example, free = torch.rand(2, 3, 8, 8), {0: DIM.DYNAMIC, 2: DIM.DYNAMIC, 3: DIM.DYNAMIC}
    files = {
        "torchscript": scripted(Squares(), segbatch__json=own),
        "pt2": exported(Squares(), example, free, segbatch__json=own),
    }
    for kind, data in files.items():
        spec = registry.source(put(tmp_path, kind, data)).describe()
        assert (spec.input.mean, [c.name for c in spec.classes.classes]) == ((0.5, 0.5, 0.5), ["a", "b", "c"])
    ultralytics = json.dumps(
        {"names": {"0": "p", "1": "q", "2": "r"}, "imgsz": [8, 12], "stride": 4, "license": "AGPL"}
    )
    spec = registry.source(put(tmp_path, "torchscript", scripted(Squares(), config__txt=ultralytics))).describe()
    assert [c.name for c in spec.classes.classes] == ["p", "q", "r"]
    assert (spec.input.height, spec.input.width, spec.input.resize, spec.licence) == (8, 12, "letterbox", "AGPL")


# --- pt2 alone


class Everything(nn.Module):
    """Much of what programs hold: arithmetic on sizes, several results, constants, a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("shift", torch.tensor([0.5]), persistent=False)
        self.factor = torch.tensor([2.0, 3.0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            mean = x.mean((2, 3), keepdim=True) * self.get_buffer("shift") + self.factor[1]
        y = self.norm(self.conv(x - mean))
        left, right = torch.split(y, 4, 1)
        best, index = torch.max(y, 1)
        size = (x.shape[-2] // 2 * 2, x.shape[-1])
        up = nn.functional.interpolate(left, size=size, mode="bilinear", align_corners=False)
        right = nn.functional.gelu(right, approximate="tanh").to(torch.float64) + best[:, None]
        flat = right.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, right.shape[-1])
        return up, index, torch.einsum("nij->nji", flat)


@pytest.fixture(scope="module")
def everything() -> bytes:
    torch.manual_seed(0)
    free = {0: DIM.DYNAMIC, 2: DIM("h", min=16, max=64), 3: DIM.DYNAMIC}
    return exported(Everything(), torch.rand(2, 3, 32, 48), free)


@pytest.mark.long
def test_a_program_gives_what_torch_gives(everything: bytes) -> None:
    program = pt2_program.Program(pt2_program.Archive(everything, "test"))
    theirs = torch.export.load(io.BytesIO(everything)).module()
    for size in ((2, 3, 32, 48), (3, 3, 17, 80)):
        x = torch.rand(size)
        with torch.inference_mode():
            ours, wanted = program(x.clone()), theirs(x)
        assert [o.name for o in program.outputs] == list(ours) == ["0", "1", "2"]
        for found, expected in zip(ours.values(), wanted, strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert [o.kind for o in program.outputs] == ["f", "i", "f"]


def test_the_limits_of_a_program_hold(everything: bytes, tmp_path: Path) -> None:
    program = pt2_program.Program(pt2_program.Archive(everything, "test"))
    assert [(s.low, s.high) for s in program.sides][2] == (16, 64)
    model = predictor(put(tmp_path, "pt2", everything, PLAIN))
    for height in (15, 65):
        with pytest.raises(DataError, match=f"a side is {height}, the program was exported for 16 to 64"):
            model.predict(photo(height, 30))


class Branching(nn.Module):
    """Another computation for large photos."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x if x.shape[2] + x.shape[3] > 40 and x.shape[2] % 2 == 0 else -x


def test_the_conditions_of_a_program_hold(tmp_path: Path) -> None:
    data = exported(Branching(), torch.rand(2, 3, 32, 48), {0: DIM.AUTO, 2: DIM.AUTO, 3: DIM.AUTO})
    model = predictor(put(tmp_path, "pt2", data, PLAIN))
    rgb = photo(30, 14)
    np.testing.assert_array_equal(model.predict(rgb).semantic, rgb.argmax(-1))
    for height, width in ((20, 14), (31, 14)):
        with pytest.raises(DataError, match="was not exported for such sizes"):
            model.predict(photo(height, width))


def test_a_fixed_program(tmp_path: Path) -> None:
    reference = put(tmp_path, "pt2", exported(Squares(), torch.rand(1, 3, 8, 12)), PLAIN)
    spec = registry.source(reference).describe()
    assert (spec.input.height, spec.input.width, spec.input.resize) == (8, 12, "stretch")
    photos = [photo(8, 12, seed) for seed in range(3)]
    for found, rgb in zip(label_maps(reference, photos, batch_size=3), photos, strict=True):
        np.testing.assert_array_equal(found, rgb.argmax(-1))


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train(), (torch.rand(2, 3, 8, 8),)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with pytest.raises(ConfigError, match=r"export it after \.eval\(\)"):
        registry.source(put(tmp_path, "pt2", buffer.getvalue(), PLAIN)).describe()


def test_older_archives_with_their_weights_in_one_file(everything: bytes) -> None:
    state = dict(torch.export.load(io.BytesIO(everything)).state_dict)
    saved = io.BytesIO()
    torch.save(state, saved)
    older = rewritten(
        everything,
        lambda name, content: None if name.startswith("data/weights/") else content,
        {"data/weights/model.pt": saved.getvalue()},
    )
    x = torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        programs = [pt2_program.Program(pt2_program.Archive(data, "test")) for data in (everything, older)]
        first, second = (list(p(x).values()) for p in programs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def edited(data: bytes, change: Callable[[Any], None], member: str = "models/model.json") -> bytes:
    """The same file with a JSON member changed."""

    def rewrite(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return rewritten(data, rewrite)


def first_node(document: Any) -> Any:
    return document["graph_module"]["graph"]["nodes"][0]


def attacks(mark: Path) -> Iterator[tuple[str, Callable[[bytes], bytes], str]]:
    command = f"mkdir {mark}"
    argument = {"name": "command", "arg": {"as_string": command}, "kind": 1}

    def system(document: Any) -> None:
        first_node(document).update(target="torch.os.system", inputs=[argument])

    def file_name(document: Any) -> None:
        inputs = [{"name": "filename", "arg": {"as_string": str(mark)}, "kind": 1}]
        first_node(document).update(target="torch.ops.aten.from_file.default", inputs=inputs)

    def condition(document: Any) -> None:
        document["guards_code"] = [f"__import__('os').system({command!r}) == 0"]

    def pickled(document: Any) -> None:
        entry = next(iter(document["config"].values()))
        entry.update(use_pickle=True)

    yield "an operator of Python", lambda d: edited(d, system), "needs torch.os.system, which is not run here"
    yield "a file name", lambda d: edited(d, file_name), "argument filename of the kind as_string"
    yield (
        "a pickled tensor",
        lambda d: edited(d, pickled, "data/weights/model_weights_config.json"),
        "is pickled, no plain tensor",
    )
    yield "a condition", lambda d: edited(d, condition), r"the condition __import__.* is not understood"
    yield (
        "weights in a pickle",
        lambda d: rewritten(d, lambda _, c: c, {"data/weights/model.pt": pickle.dumps(_Bomb(mark), 2)}),
        "not a readable torch file",
    )
    yield "compiled code", lambda d: rewritten(d, lambda _, c: c, {"data/aotinductor/model/x.so": b""}), "compiled code"


def test_nothing_in_a_program_is_run_but_operators(everything: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, attack, words in attacks(mark):
        with pytest.raises(ConfigError, match=words):
            registry.source(put(tmp_path, "pt2", attack(everything), PLAIN)).load(1)
        assert not mark.exists(), name


def test_what_is_not_needed_is_not_read(everything: bytes, tmp_path: Path) -> None:
    """Example inputs are pickled, expressions are code: neither matters here."""
    mark = tmp_path / "mark"
    code = f"__import__('os').mkdir({str(mark)!r})"

    def expressions(document: Any) -> None:
        values = document["graph_module"]["graph"]["sym_int_values"]
        for value in values.values():
            value["as_expr"]["expr_str"] = code

    bombs = rewritten(
        edited(everything, expressions),
        lambda name, content: pickle.dumps(_Bomb(mark)) if name.startswith("data/sample_inputs") else content,
    )
    x = torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        found, wanted = (
            list(pt2_program.Program(pt2_program.Archive(d, "test"))(x).values()) for d in (bombs, everything)
        )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["schema_version"].update(major=9), "schema version 9, 8 is understood"),
        (lambda d: d.pop("graph_module"), "models/model.json is not understood"),
        (lambda d: first_node(d).update(target="torch.ops.aten.no_such.default"), "lacks"),
        (lambda d: first_node(d).update(target="torch.ops.evil.run.default"), "is not run here"),
    ],
)
def test_programs_that_are_not_understood(
    everything: bytes, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.source(put(tmp_path, "pt2", edited(everything, change), PLAIN)).describe()


def test_tensors_that_do_not_fit_their_description(everything: bytes, tmp_path: Path) -> None:
    def larger(document: Any) -> None:
        document["config"]["conv.weight"]["tensor_meta"]["sizes"][0]["as_int"] = 1 << 20

    def lost(document: Any) -> None:
        del document["config"]["conv.weight"]

    listing = "data/weights/model_weights_config.json"
    for change, words in ((larger, f"{listing} is not understood"), (lost, "lacks the tensor conv.weight")):
        with pytest.raises(ConfigError, match=words):
            registry.source(put(tmp_path, "pt2", edited(everything, change, listing), PLAIN)).load(1)
