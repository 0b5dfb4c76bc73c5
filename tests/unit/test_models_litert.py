"""LiteRT files: tiny ones made here, and the real ones where they are."""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from segbatch.errors import ConfigError
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry

pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema

SIZE = (4, 6)
OPERATIONS, TYPES = schema.BuiltinOperator, schema.TensorType


def tiny_file(
    operation: int,
    kind_in: int,
    kind_out: int,
    shape_out: tuple[int, ...],
    axis: int | None = None,
    quantised: tuple[float, int] | None = None,
    channels: int = 3,
) -> bytes:
    """A LiteRT file with one operation on (1, *SIZE, channels); ``axis`` is its second input."""
    flatbuffers = pytest.importorskip("flatbuffers")
    tensors = [_tensor("in", (1, *SIZE, channels), kind_in), _tensor("out", shape_out, kind_out)]
    if quantised:
        tensors[1].quantization = schema.QuantizationParametersT()
        tensors[1].quantization.scale, tensors[1].quantization.zeroPoint = [quantised[0]], [quantised[1]]
        tensors[0].quantization = tensors[1].quantization
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    if axis is not None:
        buffer = schema.BufferT()
        buffer.data = list(np.array([axis], np.int32).tobytes())
        model.buffers.append(buffer)
        tensors.append(_tensor("axis", (1,), TYPES.INT32, 1))
        operator.inputs = [0, 2]
    if operation == OPERATIONS.ARG_MAX:
        operator.builtinOptions, operator.builtinOptionsType = (
            schema.ArgMaxOptionsT(),
            schema.BuiltinOptions.ArgMaxOptions,
        )
        operator.builtinOptions.outputType = kind_out
    if operation == OPERATIONS.REDUCE_MAX:
        operator.builtinOptions, operator.builtinOptionsType = (
            schema.ReducerOptionsT(),
            schema.BuiltinOptions.ReducerOptions,
        )
        operator.builtinOptions.keepDims = True
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [0], [1], [operator]
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = operation, min(operation, 127), 1
    model.operatorCodes, model.subgraphs = [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(name: str, shape: tuple[int, ...], kind: int, buffer: int = 0) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
    return tensor


def labels_file() -> bytes:
    return tiny_file(OPERATIONS.ARG_MAX, TYPES.UINT8, TYPES.INT64, (1, *SIZE), axis=3)


def scores_file() -> bytes:
    return tiny_file(OPERATIONS.RELU, TYPES.FLOAT32, TYPES.FLOAT32, (1, *SIZE, 3))


def foreground_file() -> bytes:
    return tiny_file(OPERATIONS.REDUCE_MAX, TYPES.FLOAT32, TYPES.FLOAT32, (1, *SIZE, 1), axis=3)


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write(folder: Path, data: bytes, **beside: str) -> str:
    (folder / "net.tflite").write_bytes(data)
    for name, text in beside.items():
        (folder / name.replace("__", ".")).write_text(text)
    return f"litert:{folder}/net.tflite"


def predict(reference: str, *photos: NDArray[np.uint8]) -> list[Any]:
    predictor = Predictor(registry.source(reference).load(1), 2)
    found = [predictor.finish(r) for r in predictor.forward([predictor.prepare(p) for p in photos])]
    return [(f.semantic, f.class_confidence) for f in found]


def test_label_maps_come_out_as_they_are(tmp_path: Path) -> None:
    reference = write(tmp_path, labels_file())
    spec = registry.source(reference).describe()
    assert (spec.output, spec.input.dtype, spec.input.resize, spec.classes.classes) == (
        "labels",
        "uint8",
        "stretch",
        (),
    )
    images = [photo(s) for s in range(3)]
    for image, (label_map, confidence) in zip(images, predict(reference, *images), strict=True):
        assert confidence is None
        np.testing.assert_array_equal(label_map, image.argmax(-1))


def test_scores_become_labels_with_confidence(tmp_path: Path) -> None:
    reference = write(tmp_path, scores_file(), net_labels__txt="red\ngreen\nblue\n")
    image = photo()
    [(label_map, confidence)] = predict(reference, image)
    np.testing.assert_array_equal(label_map, image.argmax(-1))
    scores = np.exp(image / 255)
    wanted = (scores / scores.sum(-1, keepdims=True)).max(-1)
    assert confidence == pytest.approx({k: wanted[label_map == k].mean() for k in np.unique(label_map)}, rel=1e-5)
    assert [c.name for c in registry.source(reference).describe().classes.classes] == ["red", "green", "blue"]


def test_one_probability_becomes_two_classes(tmp_path: Path) -> None:
    reference = write(tmp_path, foreground_file())
    assert [c.name for c in registry.source(reference).describe().classes.classes] == ["background", "foreground"]
    image = photo() // 2 + photo(1) // 4
    [(label_map, confidence)] = predict(reference, image)
    probability = image.max(-1) / 255
    np.testing.assert_array_equal(label_map, probability > 0.5)
    assert confidence[1] == pytest.approx(probability[probability > 0.5].mean(), rel=1e-4)
    assert confidence[0] == pytest.approx(1 - probability[probability <= 0.5].mean(), rel=1e-4)


def test_probabilities_out_of_range_are_noticed(tmp_path: Path) -> None:
    reference = write(tmp_path, foreground_file(), net__tflite__toml="std = [0.1, 0.1, 0.1]")
    with pytest.raises(ConfigError, match=r'no probabilities.*scores = "logits"'):
        predict(reference, photo())


def test_quantised_scores_are_scaled_back(tmp_path: Path) -> None:
    data = tiny_file(OPERATIONS.RELU, TYPES.UINT8, TYPES.UINT8, (1, *SIZE, 3), quantised=(0.05, 10))
    segmenter = registry.source(write(tmp_path, data)).load(1)
    image = np.maximum(photo(), 10)
    logits = segmenter.forward(image[None])
    np.testing.assert_allclose(logits[0], (np.moveaxis(image, -1, 0).astype(np.float32) - 10) * 0.05, rtol=1e-5)


def test_the_side_car_names_classes_and_normalisation(tmp_path: Path) -> None:
    side_car = 'classes = ["a", "b", "c"]\nlabel_ids = [5, 6, 400]\nmean = [0.5, 0.5, 0.5]\nlicence = "MIT"'
    plain = registry.source(write(tmp_path, scores_file())).describe()
    reference = write(tmp_path, scores_file(), net__tflite__toml=side_car)
    spec = registry.source(reference).describe()
    assert (spec.input.mean, spec.licence, spec.digest != plain.digest) == ((0.5, 0.5, 0.5), "MIT", True)
    [(label_map, _)] = predict(reference, photo())
    assert set(np.unique(label_map)) <= {5, 6, 400}
    for text, words in (
        ('classes = ["a"]', "names 1 classes, .* has 3 outputs"),
        ("meen = [0, 0, 0]", "did you mean mean"),
        ("classes = [", "not TOML"),
    ):
        with pytest.raises(ConfigError, match=words):
            registry.source(write(tmp_path, scores_file(), net__tflite__toml=text)).describe()


def test_the_given_class_list_comes_before_the_side_car(tmp_path: Path) -> None:
    reference = write(tmp_path, scores_file(), net__tflite__toml='classes = ["a", "b", "c"]', own__txt="x\ny\nz")
    spec = registry.source(reference, f"{tmp_path}/own.txt").describe()
    assert [c.name for c in spec.classes.classes] == ["x", "y", "z"]


def test_labels_packed_into_the_file_are_found(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("labelmap.txt", "x\ny\nz\n")
    spec = registry.source(write(tmp_path, scores_file() + archive.getvalue())).describe()
    assert [c.name for c in spec.classes.classes] == ["x", "y", "z"]


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    digests = [registry.source(write(tmp_path / n, scores_file())).describe().digest for n in "ab"]
    assert digests[0] == digests[1]
    assert registry.source(write(tmp_path / "b", foreground_file())).describe().digest != digests[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not a model at all", "not a LiteRT file"),
        (tiny_file(OPERATIONS.RELU, TYPES.FLOAT32, TYPES.FLOAT32, (1, *SIZE, 4), channels=4), "its input is float32"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.source(write(tmp_path, data)).describe()


def test_a_missing_file_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        registry.source(f"litert:{tmp_path}/none.tflite").describe()
    reference = write(tmp_path, scores_file())
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ConfigError, match=r"pip install 'segbatch\[litert\]'"):
        registry.source(reference).describe()


def test_the_real_pascal_network_finds_the_bird(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("weights/coral_deeplab")
    reference = f"litert:{folder}/deeplabv3_mnv2_pascal_quant.tflite"
    spec = registry.source(reference).describe()
    assert (len(spec.classes.classes), spec.classes.classes[3].name) == (21, "bird")
    assert spec.classes.classes[3].color == (128, 128, 0)
    rgb = np.asarray(Image.open(folder / "bird_segmentation.bmp").convert("RGB"))
    truth = np.asarray(Image.open(folder / "bird_segmentation_mask.bmp").convert("RGB")).max(-1) > 0
    [(label_map, _)] = predict(reference, rgb)
    bird = label_map == 3
    assert (bird & truth).sum() / (bird | truth).sum() > 0.88


def test_the_real_selfie_network_finds_a_person(shared_data: Callable[[str], Path]) -> None:
    reference = f"litert:{shared_data('weights/mediapipe_selfie')}/selfie_segmentation.tflite"
    rgb = np.asarray(Image.open(shared_data("data/ccp/photos/0001.jpg")).convert("RGB"))
    [(label_map, confidence)] = predict(reference, rgb)
    assert label_map.shape == rgb.shape[:2]
    assert 0.1 < (label_map == 1).mean() < 0.6
    assert confidence is not None and min(confidence.values()) > 0.8
