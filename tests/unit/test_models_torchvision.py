"""torchvision's networks with random weights on disk: the same pixels as torchvision's own pipeline gives."""

import hashlib
import pickle
import re
import sys
import threading
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import rle
from segbatch.errors import ConfigError, DataError
from segbatch.inference.pipeline import Predictor
from segbatch.models import registry
from segbatch.records import Instance

pytest.importorskip("torchvision")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import functional

from segbatch.models import torchvision_files
from segbatch.models.torchvision_zoo import TorchvisionSource

pytestmark = pytest.mark.long

SMALL = "lraspp_mobilenet_v3_large"
RCNN = "maskrcnn_resnet50_fpn"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(name: str, classes: int = 5, **options: Any) -> nn.Module:
    """A network that tells places apart: normalisation as after training, heads without a bias for one class."""
    torch.manual_seed(0)
    net: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    body = net.get_submodule("backbone" if name.startswith("maskrcnn") else "")
    with torch.no_grad():
        body.train()(torch.randn(2, 3, 64, 96))
        for key, value in net.named_parameters():
            if re.search(r"(classifier\.4|low_classifier|high_classifier|cls_logits|cls_score|mask_fcn_logits)", key):
                drawn = torch.randn_like(value).flatten(1) if value.dim() > 1 else torch.zeros_like(value)[:, None]
                value.copy_((drawn - drawn.mean(1, keepdim=True)).view_as(value))
            if "fpn.inner_blocks" in key:
                value.mul_(0.01)
    return net.eval()


def photo(height: int = 60, width: int = 90, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth blobs with noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + random.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def tensor_of(rgb: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)


def saved(net: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    return str(path)


@torch.inference_mode()
def theirs(net: nn.Module, name: str, rgb: NDArray[np.uint8], **options: Any) -> tuple[Tensor, NDArray[np.int64]]:
    """Scores on the photo's grid and label map, by torchvision's own pipeline."""
    batch = get_model_weights(name).DEFAULT.transforms(**options)(tensor_of(rgb))[None]
    logits = F.interpolate(net(batch)["out"], size=rgb.shape[:2], mode="bilinear", align_corners=False)[0]
    return logits, logits.argmax(0).numpy()


def assert_same_labels(got: Any, logits: Tensor, wanted: NDArray[np.int64]) -> None:
    """Equal where the best two scores are further apart than float32 resolves; and that is nearly everywhere."""
    best = logits.topk(2, 0).values
    clear = (best[0] - best[1] > 1e-4 * float(logits.abs().max())).numpy()
    np.testing.assert_array_equal(got[clear], wanted[clear])
    assert clear.mean() > 0.99 and len(np.unique(wanted)) > 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    net = network(SMALL)
    return net, saved(net, tmp_path_factory.mktemp("small") / "net.pth")


def source(name: str, path: str | Path, classes: str | Path = "") -> registry.ModelSource:
    return registry.source(f"torchvision:{name}@{path}", str(classes))


def predictor(name: str, path: str | Path) -> Predictor:
    return Predictor(source(name, path).load(1), 4)


@pytest.mark.parametrize("size", [(640, 700), (1, 1)])
def test_the_label_map_is_that_of_torchvision(small: tuple[nn.Module, str], size: tuple[int, int]) -> None:
    net, path = small
    rgb = photo(*size)
    ours = predictor(SMALL, path)
    batch = get_model_weights(SMALL).DEFAULT.transforms()(tensor_of(rgb))
    prepared = ours.prepare(rgb)
    np.testing.assert_array_equal(prepared.tensor, batch.numpy())
    assert prepared.geometry[2:] == (*batch.shape[1:], *batch.shape[1:])
    got = ours.predict(rgb).semantic
    if size == (1, 1):
        assert got is not None and got.shape == (1, 1)
    else:
        assert_same_labels(got, *theirs(net, SMALL, rgb))


def test_the_label_map_of_a_real_photo(small: tuple[nn.Module, str], shared_data: Callable[[str], Path]) -> None:
    file = sorted(shared_data("data/coco_tiny/train2017").glob("*.jpg"))[0]
    rgb = np.asarray(Image.open(file).convert("RGB"))
    assert_same_labels(predictor(SMALL, small[1]).predict(rgb).semantic, *theirs(small[0], SMALL, rgb))


@pytest.mark.long
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_auxiliary_heads_are_left_out(name: str, tmp_path: Path) -> None:
    net = network(name, aux_loss=True)
    path = saved(net, tmp_path / "net.pth")
    Path(f"{path}.toml").write_text("height = 64")
    assert any(k.startswith("aux_classifier.") for k in net.state_dict())
    ours = predictor(name, path)
    assert not any("aux" in k for k in ours._segmenter.net.state_dict())  # type: ignore[attr-defined]
    assert_same_labels(ours.predict(photo()).semantic, *theirs(net, name, photo(), resize_size=64))


@pytest.mark.parametrize("name", torchvision_files.names())
def test_every_network_is_described(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = get_model(name, weights=None, weights_backbone=None, num_classes=7)
    last = next(k for k in ("roi_heads.box_predictor.cls_score.weight", "classifier.low_classifier.weight",
                            "classifier.4.weight") if k in net.state_dict())  # fmt: skip
    torch.save({last: torch.zeros(net.state_dict()[last].shape)}, tmp_path / "one.pth")
    (tmp_path / "classes.txt").write_text("\n".join("abcdefg"))
    with pytest.raises(ConfigError, match=rf"{len(net.state_dict()) - 1 - _counters(net)} tensors missing: "):
        source(name, tmp_path / "one.pth", tmp_path / "classes.txt").describe()


def _counters(net: nn.Module) -> int:
    return sum(k.endswith("num_batches_tracked") for k in net.state_dict())


@pytest.mark.parametrize(
    ("text", "size", "options"),
    [
        ("height = 96", None, {"resize_size": 96}),
        ("height = 70\nwidth = 50", [70, 50], {"resize_size": None}),
        ('resize = "none"\nmean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.3, 0.4]', None,
         {"resize_size": None, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}),
        ("height = 96\nlongest = 100", [66, 100], {"resize_size": None}),
    ],
)  # fmt: skip
def test_a_side_car_changes_the_transform(
    small: tuple[nn.Module, str], tmp_path: Path, text: str, size: list[int] | None, options: dict[str, Any]
) -> None:
    path = saved(small[0], tmp_path / "net.safetensors")
    Path(f"{path}.toml").write_text(text)
    image = tensor_of(photo())
    if size:
        image = functional.resize(image, size, antialias=True)
    wanted = get_model_weights(SMALL).DEFAULT.transforms(**options)(image)
    ours = predictor(SMALL, path)
    np.testing.assert_array_equal(ours.prepare(photo()).tensor, wanted.numpy())
    with torch.inference_mode():
        logits = F.interpolate(small[0](wanted[None])["out"], size=(60, 90), mode="bilinear")[0]
    assert_same_labels(ours.predict(photo()).semantic, logits, logits.argmax(0).numpy())
    assert ours.spec.digest != source(SMALL, small[1]).describe().digest


def test_blue_may_come_first(small: tuple[nn.Module, str], tmp_path: Path) -> None:
    path = saved(small[0], tmp_path / "net.pth")
    plain = source(SMALL, path).describe()
    Path(f"{path}.toml").write_text('channel_order = "bgr"')
    segmenter = source(SMALL, path).load(1)
    batch = np.random.default_rng(0).standard_normal((2, 3, 64, 96), np.float32)
    with torch.inference_mode():
        wanted = small[0](torch.from_numpy(batch[:, ::-1].copy()))["out"].numpy()
    np.testing.assert_allclose(segmenter.forward(batch), wanted, atol=1e-5 * np.abs(wanted).max())
    assert segmenter.spec.digest != plain.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("divisor = 8", "divisor cannot be chosen"),
        ('resize = "letterbox"', 'knows no resize = "letterbox"'),
        ("width = 50", 'resize = "stretch" goes with height and width'),
        ('resize = "none"\nheight = 90', 'resize = "none" goes with no size'),
        ("height = 90\nlongest = 90", "longest = 90 is not more than height = 90"),
        ('classes = ["a", "b"]', "names 2 classes, .* has 5 outputs"),
    ],
)
def test_a_side_car_that_cannot_be_heeded_is_an_error(
    small: tuple[nn.Module, str], tmp_path: Path, text: str, message: str
) -> None:
    path = saved(small[0], tmp_path / "net.pth")
    Path(f"{path}.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        source(SMALL, path).describe()


def test_a_strip_that_would_become_gigabytes_is_a_bad_photo(small: tuple[nn.Module, str]) -> None:
    with pytest.raises(DataError, match="would be fed as 520 x 260000") as raised:
        predictor(SMALL, small[1]).prepare(np.zeros((2, 1000, 3), np.uint8))
    assert raised.value.code == "too-large"


def test_wrapped_and_safe_files_are_the_same_network(small: tuple[nn.Module, str], tmp_path: Path) -> None:
    state = small[0].state_dict()
    torch.save({"epoch": 3, "model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "bare.pth")
    saved(small[0], tmp_path / "net.safetensors")
    batch = np.random.default_rng(0).standard_normal((1, 3, 64, 96), np.float32)
    wanted = source(SMALL, small[1]).load(1).forward(batch)
    for name in ("wrapped.pt", "old.pth", "bare.pth", "net.safetensors"):
        np.testing.assert_array_equal(source(SMALL, tmp_path / name).load(1).forward(batch), wanted)


def test_classes_are_never_guessed(tmp_path: Path) -> None:
    path = saved(network(SMALL, 21), tmp_path / "net.pth")
    assert source(SMALL, path).describe().classes.classes == ()
    Path(f"{path}.toml").write_text(f"classes = {[f'c{i}' for i in range(21)]}\nlabel_ids = {list(range(10, 31))}")
    beside = source(SMALL, path).describe()
    assert [(c.label_id, c.name) for c in beside.classes.classes][:2] == [(10, "c0"), (11, "c1")]
    (tmp_path / "list.txt").write_text("\n".join(f"n{i}" for i in range(21)))
    listed = source(SMALL, path, tmp_path / "list.txt").describe()
    assert listed.classes.name_of(3) == "n3" and listed.digest != beside.digest


def test_one_output_is_the_foreground(tmp_path: Path) -> None:
    net = network(SMALL, 1)
    path = saved(net, tmp_path / "net.pth")
    Path(f"{path}.toml").write_text("height = 64")
    ours = predictor(SMALL, path)
    assert [c.name for c in ours.spec.classes.classes] == ["background", "foreground"]
    logits, _ = theirs(net, SMALL, photo(), resize_size=64)
    both = torch.cat([torch.zeros_like(logits), logits])
    assert_same_labels(ours.predict(photo()).semantic, both, both.argmax(0).numpy())


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Path], Any]:
    """Make a file torchvision's own: it lies in torch's cache and its SHA-256 is in the name of the trained weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def publish(name: str, file: Path) -> Any:
        digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        trained = get_model_weights(name).DEFAULT
        monkeypatch.setattr(trained.value, "url", f"https://example.org/{name}_coco-{digits}.pth")
        folder = tmp_path / "home/hub/checkpoints"
        folder.mkdir(parents=True)
        (folder / f"{name}_coco-{digits}.pth").write_bytes(file.read_bytes())
        return trained

    return publish


def test_trained_weights_come_from_the_cache(tmp_path: Path, published: Callable[[str, Path], Any]) -> None:
    path = Path(saved(network(SMALL, 21), tmp_path / "net.pth"))
    trained = published(SMALL, path)
    named = registry.source(f"torchvision:{SMALL}=DEFAULT")
    spec = named.describe()
    assert named.load(1).spec == spec and spec.source == trained.url
    assert [c.name for c in spec.classes.classes][:2] == ["background", "aeroplane"]
    assert spec.classes.classes[1].color == (128, 0, 0)
    same = source(SMALL, path).describe()
    assert same.classes == spec.classes and same.digest == spec.digest
    assert registry.source(f"torchvision:{SMALL}={trained}").describe().digest == spec.digest
    cached = next((tmp_path / "home").rglob("*.pth"))
    torch.save(network(SMALL, 20).state_dict(), cached)
    with pytest.raises(ConfigError, match="is damaged"):
        named.describe()


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ConfigError, match=r"d234d4ea.pth cannot be downloaded: .*no route .*torchvision:NAME@FILE"):
        registry.source(f"torchvision:{SMALL}=COCO_WITH_VOC_LABELS_V1").describe()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("fcn_resnet5", "unknown name fcn_resnet5; did you mean fcn_resnet50.*known: deeplab"),
        ("resnet50=DEFAULT", "unknown name resnet50"),
        (SMALL, f"has no weights of its own .*{SMALL}=COCO_WITH_VOC_LABELS_V1"),
        (f"{SMALL}=COCO_V1", "has no weights COCO_V1.*known: COCO_WITH_VOC_LABELS_V1"),
        (f"{SMALL}@/nowhere/net.pth", "nowhere"),
    ],
)
def test_wrong_references_are_errors(what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.source(f"torchvision:{what}").describe()


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"needs the package torchvision .*segbatch\[pretrained\]"):
        registry.source(f"torchvision:{SMALL}=DEFAULT").describe()


def test_files_of_something_else_are_errors(small: tuple[nn.Module, str], tmp_path: Path) -> None:
    state = small[0].state_dict()
    file = tmp_path / "net.pth"
    with pytest.raises(ConfigError, match=r"is no fcn_resnet50: it lacks the tensor classifier.4.weight"):
        source("fcn_resnet50", small[1]).describe()
    torch.save({**state, "backbone.0.0.weight": torch.zeros(1), "more": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"1 tensors unknown: more; 1 tensors of another shape: backbone.0.0.weight"):
        source(SMALL, file).describe()
    torch.save({"state_dict": {**state, "args": "x"}}, file)
    with pytest.raises(ConfigError, match=r"holds args \(str\) among its tensors .*save the tensors alone"):
        source(SMALL, file).describe()
    torch.save(small[0], file)
    with pytest.raises(ConfigError, match=r"is not a readable torch file: .*save the tensors alone"):
        source(SMALL, file).describe()
    file.write_bytes(Path(saved(small[0], tmp_path / "net.safetensors")).read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is not a readable"):
        source(SMALL, file).describe()


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "boom",)

    torch.save({"classifier.low_classifier.weight": Bomb()}, tmp_path / "net.pth")
    with pytest.raises(ConfigError):
        source(SMALL, tmp_path / "net.pth").describe()
    assert not (tmp_path / "boom").exists()


def test_describe_and_load_agree_in_every_process(small: tuple[nn.Module, str]) -> None:
    found = source(SMALL, small[1])
    assert found.describe() == found.load(1).spec == pickle.loads(pickle.dumps(found)).describe()
    assert found.reference == f"torchvision:{SMALL}@{small[1]}" == found.describe().name


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_share_a_network(small: tuple[nn.Module, str]) -> None:
    segmenter = source(SMALL, small[1]).load(1)
    batches = np.random.default_rng(0).standard_normal((4, 1, 3, 64, 96), np.float32)
    alone = [segmenter.forward(b) for b in batches]
    found: dict[int, Any] = {}
    in_threads(lambda i: found.update({i: segmenter.forward(batches[i])}))
    for i, wanted in enumerate(alone):
        np.testing.assert_array_equal(found[i], wanted)


RCNN_SIDE_CAR = """
classes = ["background", "a", "b", "c", "d"]
height = 64
longest = 112
top_k = 10
"""


@pytest.fixture(scope="module")
def rcnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    net = network(RCNN, min_size=64, max_size=112, box_detections_per_img=10)
    path = saved(net, tmp_path_factory.mktemp("rcnn") / "net.pth")
    Path(f"{path}.toml").write_text(RCNN_SIDE_CAR)
    return net, path


@pytest.fixture(scope="module")
def ours(rcnn: tuple[nn.Module, str]) -> Predictor:
    """The same network as a model; the first thing that it sees is a strip, of which torchvision would take strides."""
    found = predictor(RCNN, rcnn[1])
    found.predict(photo(3, 60))
    return found


def found_by(ours: Predictor, rgb: NDArray[np.uint8]) -> tuple[Instance, ...]:
    found = ours.predict(rgb).instances
    assert found is not None
    return found


def boxes_of(found: Iterable[Instance]) -> NDArray[np.float64]:
    return np.array([i.bbox_xywh for i in found])


def assert_same_instances(net: nn.Module, ours: Predictor, rgb: NDArray[np.uint8]) -> None:
    """Boxes, labels and scores within 1e-4, masks pixel by pixel."""
    with torch.inference_mode():
        wanted = net([tensor_of(rgb) / 255])[0]
        images, _ = net.transform([tensor_of(rgb) / 255])  # type: ignore[operator]
    prepared = ours.prepare(rgb)
    np.testing.assert_array_equal(prepared.tensor[:3], images.tensors[0].numpy())
    assert prepared.geometry[2:] == (*images.image_sizes[0], *images.tensors.shape[2:])
    found = found_by(ours, rgb)
    assert len(found) == len(wanted["scores"]) > 3
    assert [i.category_id for i in found] == wanted["labels"].tolist()
    np.testing.assert_allclose(np.array([i.score for i in found]), wanted["scores"], atol=1e-4)
    x, y, right, bottom = wanted["boxes"].T
    np.testing.assert_allclose(boxes_of(found), torch.stack([x, y, right - x, bottom - y], 1), atol=1e-3)
    for instance, mask in zip(found, wanted["masks"][:, 0], strict=True):
        drawn = rle.decode(instance.counts, *rgb.shape[:2])
        near = (mask - 0.5).abs().numpy() < 1e-4
        np.testing.assert_array_equal(drawn[~near], (mask > 0.5).numpy()[~near])


@pytest.mark.parametrize("size", [(60, 90), (121, 47)])
def test_mask_rcnn_finds_what_torchvision_finds(
    rcnn: tuple[nn.Module, str], ours: Predictor, size: tuple[int, int]
) -> None:
    assert_same_instances(rcnn[0], ours, photo(*size))


def test_mask_rcnn_on_a_real_photo(
    rcnn: tuple[nn.Module, str], ours: Predictor, shared_data: Callable[[str], Path]
) -> None:
    file = sorted(shared_data("data/coco_tiny/train2017").glob("*.jpg"))[0]
    assert_same_instances(rcnn[0], ours, np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.long
def test_photos_of_one_padded_size_share_a_batch(ours: Predictor) -> None:
    photos = [photo(60, 90), photo(61, 84, seed=1)]
    prepared = [ours.prepare(p) for p in photos]
    assert prepared[0].tensor.shape == prepared[1].tensor.shape
    assert prepared[0].geometry.fed_width != prepared[1].geometry.fed_width
    for rgb, raw in zip(photos, ours.forward(prepared), strict=True):
        found, wanted = ours.finish(raw).instances or (), found_by(ours, rgb)
        assert [i.category_id for i in found] == [i.category_id for i in wanted]
        np.testing.assert_allclose(boxes_of(found), boxes_of(wanted), atol=1e-3)


def test_a_strip_of_which_nothing_would_be_left_is_a_bad_photo(ours: Predictor) -> None:
    with pytest.raises(DataError, match="a photo of 200 x 1 is too narrow"):
        ours.prepare(np.zeros((1, 200, 3), np.uint8))


@pytest.mark.long
def test_threads_share_a_mask_rcnn(ours: Predictor) -> None:
    prepared = [ours.prepare(photo(40, 60, seed=s)) for s in range(2)]
    alone = [ours.forward([p])[0].output for p in prepared]
    found: dict[int, Any] = {}
    in_threads(lambda i: found.update({i: ours.forward([prepared[i]])[0].output}), 2)
    for i, wanted in enumerate(alone):
        np.testing.assert_array_equal(found[i].scores, wanted.scores)
        np.testing.assert_array_equal(found[i].masks, wanted.masks)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mask R-CNN's state dict with 6 outputs, its tensors without content, and without counters."""
    with torch.device("meta"):
        state = get_model(RCNN, weights=None, weights_backbone=None, num_classes=6).state_dict()
    path = tmp_path_factory.mktemp("bare") / "net.pth"
    one = torch.zeros(1)
    torch.save({k: one.expand(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('classes = ["back", "a", "b", "c", "d", "e"]', [1, 2, 3, 4, 5]),
        ('classes = ["a", "b", "c", "d", "e"]', [0, 1, 2, 3, 4]),
        ('classes = ["a", "b", "c", "d", "e"]\nlabel_ids = [7, 8, 9, 10, 11]', [7, 8, 9, 10, 11]),
        ('classes = ["e", "a"]\nlabel_ids = [5, 1]', [5, 1]),
    ],
)
def test_lists_of_classes_name_outputs(bare: Path, tmp_path: Path, text: str, ids: list[int]) -> None:
    path = tmp_path / "net.pth"
    path.symlink_to(bare)
    (tmp_path / "net.pth.toml").write_text(text)
    spec = source(RCNN, path).describe()
    assert (spec.task, spec.output) == ("instance", "detections")
    assert [c.label_id for c in spec.classes.classes] == ids and all(c.isthing for c in spec.classes.classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"does not name its 5 classes .*--classes FILE"),
        ('classes = ["a", "b"]', "2 classes are named for .*, which has 5 and the background"),
        ('classes = ["a", "b"]\nlabel_ids = [1, 6]', r"give label ids in 1..5"),
        ('resize = "none"', "knows no resize"),
    ],
)
def test_lists_that_do_not_fit_are_errors(bare: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "net.pth"
    path.symlink_to(bare)
    (tmp_path / "net.pth.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        source(RCNN, path).describe()


@pytest.mark.long
def test_detections_without_a_name_are_dropped(rcnn: tuple[nn.Module, str], ours: Predictor, tmp_path: Path) -> None:
    everything = found_by(ours, photo())
    kept = max(i.category_id for i in everything)
    path = tmp_path / "net.pth"
    path.symlink_to(rcnn[1])
    Path(f"{path}.toml").write_text(f'classes = ["x"]\nlabel_ids = [{kept}]\nheight = 64\nlongest = 112\ntop_k = 10')
    found = found_by(predictor(RCNN, path), photo())
    wanted = [i for i in everything if i.category_id == kept]
    assert 0 < len(wanted) < len(everything)
    assert [(i.category_id, i.score, i.counts) for i in found] == [(kept, i.score, i.counts) for i in wanted]


def test_coco_weights_have_old_names_and_no_epsilon(tmp_path: Path, published: Callable[[str, Path], Any]) -> None:
    """What torchvision publishes as COCO_V1: names of 2019, frozen normalisation without an epsilon, 91 outputs."""
    with torch.device("meta"):
        state = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), 91).state_dict()
    old = {_name_of_2019(k): torch.zeros(1).expand(v.shape) for k, v in state.items()}
    assert sum(k not in old for k in state) == 16 + 2 + 8
    torch.save(old, tmp_path / "net.pth")
    published(RCNN, tmp_path / "net.pth")
    spec = registry.source(f"torchvision:{RCNN}=COCO_V1").describe()
    assert len(spec.classes.classes) == 80 and all(c.isthing for c in spec.classes.classes)
    assert spec.classes.name_of(1) == "person" and spec.classes.name_of(90) == "toothbrush"
    assert (spec.input.height, spec.input.longest) == (800, 1333)
    network = TorchvisionSource(f"{RCNN}=COCO_V1")._network()
    with torch.device("meta"):
        net = network.build()
        network.segmenter(net)
    assert epsilons(net) == {0.0: 53}


def _name_of_2019(key: str) -> str:
    key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
    key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    return re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", key)


def epsilons(net: nn.Module) -> Counter[float]:
    return Counter(m.eps for m in net.modules() if isinstance(m, FrozenBatchNorm2d))


def test_frozen_normalisation_is_recognised(bare: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.symlink_to(bare)
    (tmp_path / "net.pth.toml").write_text('classes = ["a", "b", "c", "d", "e"]')
    network = TorchvisionSource(f"{RCNN}@{path}")._network()
    with torch.device("meta"):
        assert epsilons(network.build()) == {1e-5: 53}
