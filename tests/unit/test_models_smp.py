"""Networks of smp with random weights on disk: the same pixels as the reloaded model of smp's own gives."""

import json
import pickle
import sys
import threading
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

pytest.importorskip("segmentation_models_pytorch")

import segmentation_models_pytorch as library
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segbatch.models import hf_folder, smp

pytestmark = pytest.mark.long

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NARROW: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(name: str = "Unet", encoder: str = "mobilenet_v2", classes: int = 4, **options: Any) -> Any:
    """A network that tells places apart: normalisation as after training, no class ahead of the others."""
    torch.manual_seed(0)
    net = getattr(library, name)(encoder, encoder_weights=None, classes=classes, **options)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    size = smp.fixed_size(net.encoder) or ((128, 160) if name == "PAN" else (64, 96))
    batch = torch.stack([torch.from_numpy(photo(*size, seed=s)).permute(2, 0, 1) / 64 - 2 for s in range(2)])
    head = next(m for m in reversed(list(net.segmentation_head.modules())) if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        net.train()(batch)
        found = torch.cat([net.eval()(b[None]) for b in batch]).transpose(0, 1).flatten(1)
        if head.bias is not None and classes > 1:
            head.weight /= found.std(1)[:, None, None, None]
            head.bias.copy_(-found.mean(1) / found.std(1))
    return net.eval()


def photo(height: int = 60, width: int = 90, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth blobs with noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + random.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def source(what: str | Path, classes: str | Path = "", loader: str = "smp") -> registry.ModelSource:
    return registry.source(f"{loader}:{what}", str(classes))


def saved(net: Any, folder: Path) -> Path:
    net.save_pretrained(folder)
    return folder


@torch.inference_mode()
def theirs(folder: Path, rgb: NDArray[np.uint8], norm: Any = IMAGENET) -> Tensor:
    """Scores on the photo's grid by smp's own reloading, pre-processing and padding."""
    net = library.from_pretrained(str(folder), encoder_weights=None).eval()
    x = library.encoders.preprocess_input(rgb, mean=norm[0], std=norm[1], input_range=[0, 1])
    batch = torch.from_numpy(x.transpose(2, 0, 1)[None]).float()
    step = net.encoder.output_stride if net.requires_divisible_input_shape else 1
    height, width = rgb.shape[:2]
    scores: Tensor = net(F.pad(batch, (0, -width % step, 0, -height % step)))
    return scores[0, :, :height, :width]


def assert_same_labels(got: Any, scores: Tensor) -> None:
    """Equal where the best two scores are further apart than float32 resolves; and that is nearly everywhere."""
    best = scores.topk(2, 0).values
    clear = (best[0] - best[1] > 1e-4 * float(scores.abs().max())).numpy()
    wanted = scores.argmax(0).numpy()
    np.testing.assert_array_equal(got[clear], wanted[clear])
    assert clear.mean() > 0.99 and len(np.unique(wanted)) > 1


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(network(**NARROW), tmp_path_factory.mktemp("smp") / "unet")


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "UnetPlusPlus": ("mobilenet_v2", {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}),
    "MAnet": ("tu-mobilenetv3_small_050", {"decoder_channels": (16, 16, 8, 8, 8), "decoder_pab_channels": 8}),
    "Linknet": ("mobilenet_v2", {"encoder_depth": 3}),
    "FPN": ("efficientnet-b0", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}),
    "PSPNet": ("mobilenet_v2", {"psp_out_channels": 16}),
    "DeepLabV3": ("mobilenet_v2", {"decoder_channels": 16}),
    "DeepLabV3Plus": ("mobilenet_v2", {"decoder_channels": 16}),
    "PAN": ("mobilenet_v2", {}),
    "UPerNet": ("tu-mobilenetv3_small_050", {"decoder_channels": 16}),
    "Segformer": ("mit_b0", {"decoder_segmentation_channels": 16}),
}


@pytest.mark.parametrize("size", [(60, 90), (61, 47), (1, 1)])
def test_the_label_map_is_that_of_smp(unet: Path, size: tuple[int, int]) -> None:
    got = Predictor(source(unet).load(1), 1).predict(photo(*size)).semantic
    if size == (1, 1):
        assert got is not None and got.shape == (1, 1)
    else:
        assert_same_labels(got, theirs(unet, photo(*size)))


def test_the_label_map_of_a_real_photo(unet: Path, shared_data: Callable[[str], Path]) -> None:
    file = sorted(shared_data("data/coco_tiny/train2017").glob("*.jpg"))[0]
    rgb = np.asarray(Image.open(file).convert("RGB"))
    assert_same_labels(Predictor(source(unet).load(1), 1).predict(rgb).semantic, theirs(unet, rgb))


@pytest.mark.parametrize("name", OTHERS)
def test_every_architecture_gives_what_smp_gives(name: str, tmp_path: Path) -> None:
    encoder, options = OTHERS[name]
    folder = saved(network(name, encoder, **options), tmp_path / "net")
    rgb = photo(140, 150) if name == "PAN" else photo()
    predictor = Predictor(source(folder).load(1), 1)
    assert_same_labels(predictor.predict(rgb).semantic, theirs(folder, rgb))
    assert (predictor.spec.input.mean, predictor.spec.input.std) == IMAGENET
    assert predictor.spec == source(folder).describe()


def changed(folder: Path, target: Path, **config: Any) -> Path:
    """The same weights under another config.json; ``...`` takes a key out."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    content = {**json.loads((folder / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return target


VIT = "tu-vit_tiny_patch16_224.augreg_in21k"
DPT: dict[str, Any] = {"decoder_intermediate_channels": (8, 8, 8, 8), "decoder_fusion_channels": 16}


@pytest.mark.long
def test_a_transformer_of_fixed_size_has_photos_stretched_to_it(tmp_path: Path) -> None:
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    folder = saved(network("DPT", VIT, img_size=64, **DPT), tmp_path / "fixed")
    found = source(folder)
    spec = found.describe()
    assert (spec.input.height, spec.input.width, spec.input.resize, spec.input.divisor) == (64, 64, "stretch", 16)
    assert (spec.input.mean, spec.input.std) == half
    assert_same_labels(Predictor(found.load(1), 1).predict(photo(64, 64)).semantic, theirs(folder, photo(64, 64), half))
    (tmp_path / "fixed.toml").write_text("height = 96\nwidth = 64")
    with pytest.raises(ConfigError, match="the network's input is 64 x 64 and no other"):
        found.describe()
    free = changed(folder, tmp_path / "free", dynamic_img_size=True)
    assert (source(free).describe().input.resize, source(free).describe().input.divisor) == ("none", 16)
    assert_same_labels(Predictor(source(free).load(1), 1).predict(photo(60, 90)).semantic, theirs(free, photo(), half))


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        ("tu-swin_tiny_patch4_window7_224", (224, 224)),
        ("tu-maxvit_tiny_rw_224", (224, 224)),
        ("tu-convnext_atto", None),
    ],
)
def test_encoders_tell_their_size(encoder: str, size: tuple[int, int] | None) -> None:
    with torch.device("meta"):
        assert smp.fixed_size(library.Unet(encoder, encoder_weights=None).encoder) == size


@pytest.mark.parametrize(
    ("encoder", "weights", "mean"),
    [
        ("resnet34", "imagenet", IMAGENET[0]),
        ("resnet34", None, IMAGENET[0]),
        ("xception", None, (0.5, 0.5, 0.5)),
        ("inceptionv4", "imagenet+background", (0.5, 0.5, 0.5)),
        ("dpn68b", "imagenet+5k", (124 / 255, 117 / 255, 104 / 255)),
        ("timm-efficientnet-b3", "noisy-student", IMAGENET[0]),
        ("timm-efficientnet-b3", "advprop", (0.5, 0.5, 0.5)),
        ("timm-tf_efficientnet_lite0", "imagenet", (0.5, 0.5, 0.5)),
    ],
)
def test_photos_are_normalised_as_the_encoder_was_trained(encoder: str, weights: str | None, mean: Any) -> None:
    assert smp.normalisation(encoder, weights)[0] == mean


@pytest.mark.parametrize(
    "encoder", ["tu-vit_tiny_patch16_224.augreg_in21k", "tu-resnet18.a1_in1k", "tu-tf_efficientnet_lite0"]
)
def test_encoders_of_timm_are_normalised_as_smp_says(encoder: str) -> None:
    params = library.encoders.get_preprocessing_params(encoder)
    assert smp.normalisation(encoder, None) == (tuple(params["mean"]), tuple(params["std"]))


def test_old_names_of_timm_encoders_are_understood() -> None:
    assert smp.normalisation("timm-mobilenetv3_large_100", None) == smp.normalisation(
        "tu-tf_mobilenetv3_large_100", None
    )


def test_encoder_weights_decide_the_normalisation_and_are_not_downloaded(
    unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(library.encoders, "hf_hub_download", no_network)
    plain = changed(unet, tmp_path / "plain", encoder_weights="imagenet")
    other = changed(unet, tmp_path / "other", encoder_weights="advprop")
    assert source(plain).load(1).spec.digest == source(unet).describe().digest
    assert source(other).load(1).spec.input.mean == (0.5, 0.5, 0.5)
    assert source(other).describe().digest != source(plain).describe().digest


@pytest.mark.parametrize(
    ("activation", "output"),
    [("identity", "logits"), ("logsoftmax", "logits"), ("sigmoid", "probabilities"), ("softmax2d", "probabilities")],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_the_activation_decides_what_comes_out(unet: Path, tmp_path: Path, activation: str, output: str) -> None:
    folder = changed(unet, tmp_path / "net", activation=activation)
    predictor = Predictor(source(folder).load(1), 1)
    assert predictor.spec.output == output
    prediction = predictor.predict(photo())
    scores = theirs(folder, photo())
    assert_same_labels(prediction.semantic, scores)
    total = {"logits": scores.softmax(0), "probabilities": scores / scores.sum(0)}[output].max(0)
    assert prediction.class_confidence is not None
    for label, mean in prediction.class_confidence.items():
        assert mean == pytest.approx(float(total.values[total.indices == label].mean()), abs=1e-3)


def test_labels_are_labels(unet: Path, tmp_path: Path) -> None:
    folder = changed(unet, tmp_path / "net", activation="argmax2d")
    predictor = Predictor(source(folder).load(1), 1)
    assert predictor.spec.output == "labels"
    assert_same_labels(predictor.predict(photo()).semantic, theirs(unet, photo()))


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_one_output_is_the_foreground(tmp_path: Path, activation: str | None) -> None:
    net = network(classes=1, activation=activation, **NARROW)
    folder = saved(net, tmp_path / "net")
    predictor = Predictor(source(folder).load(1), 1)
    assert [c.name for c in predictor.spec.classes.classes] == ["background", "foreground"]
    (tmp_path / "net.toml").write_text('classes = ["sky", "cloud"]')
    assert [c.name for c in source(folder).describe().classes.classes] == ["sky", "cloud"]
    score = theirs(folder, photo())
    foreground = score if activation else score.sigmoid()
    assert_same_labels(predictor.predict(photo()).semantic, torch.cat([1 - foreground, foreground]))


def test_a_classification_head_is_left_out(tmp_path: Path) -> None:
    folder = saved(network(**NARROW), tmp_path / "plain")
    net = library.Unet("mobilenet_v2", encoder_weights=None, classes=4, aux_params={"classes": 3}, **NARROW)
    net.load_state_dict({**net.state_dict(), **load_file(folder / "model.safetensors")})
    both = saved(net, tmp_path / "both")
    assert_same_labels(Predictor(source(both).load(1), 1).predict(photo()).semantic, theirs(folder, photo()))


def test_a_side_car_changes_what_is_fed(unet: Path, tmp_path: Path) -> None:
    folder = changed(unet, tmp_path / "net")
    plain = source(folder).describe()
    assert plain.classes.classes == () and plain.digest == source(unet).describe().digest
    (tmp_path / "net.toml").write_text(
        'classes = ["a", "b", "c", "d"]\nlabel_ids = [7, 5, 3, 1]\nheight = 64\nwidth = 32\nchannel_order = "bgr"\n'
        'mean = [0.1, 0.2, 0.3]\nstd = [0.3, 0.2, 0.1]\nlicence = "CC0"'
    )
    predictor = Predictor(source(folder).load(1), 1)
    spec = predictor.spec
    assert (spec.input.height, spec.input.width, spec.input.resize) == (64, 32, "stretch") and spec.licence == "CC0"
    label_map = predictor.predict(photo(64, 32)).semantic
    normalised = (photo(64, 32) / 255 - (0.1, 0.2, 0.3)) / (0.3, 0.2, 0.1)
    with torch.inference_mode():
        batch = torch.from_numpy(normalised[..., ::-1].transpose(2, 0, 1).copy()).float()
        scores = library.from_pretrained(str(folder), encoder_weights=None).eval()(batch[None])[0]
    assert label_map is not None
    assert_same_labels((7 - label_map) // 2, scores)
    assert spec.digest != plain.digest
    (tmp_path / "list.txt").write_text("w\nx\ny\nz")
    assert source(folder, tmp_path / "list.txt").describe().classes.name_of(2) == "y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_score = 0.5", "min_score cannot be chosen"),
        ('classes = ["a"]', "names 1 classes, .* has 4 outputs"),
        ("divisor = 12", "divisor = 12, but the network needs a multiple of 8"),
    ],
)
def test_side_cars_that_do_not_fit_are_errors(tmp_path: Path, text: str, message: str) -> None:
    folder = saved(library.Linknet("mobilenet_v2", encoder_depth=3, encoder_weights=None, classes=4), tmp_path / "net")
    (tmp_path / "net.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        source(folder).describe()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_model_class": "Vnet"}, "unknown _model_class Vnet; did you mean unet.*known: Unet, "),
        ({"_model_class": "get_preprocessing_fn"}, "unknown _model_class"),
        ({"_model_class": ...}, "names no _model_class .*smp:ARCHITECTURE/ENCODER@FILE"),
        ({"in_channels": 4}, "the network reads 4 channels"),
        ({"encoder_name": "resnet81"}, "smp.Unet cannot be built: .*resnet81"),
        ({"encoder_name": "tu-local-dir:/etc"}, "is no name of smp's or timm's"),
        ({"encoder_name": "tu-resnet18", "checkpoint_path": "x.pth"}, "checkpoint_path would make timm read"),
        ({"activation": ["relu"]}, "what comes out of activation .*relu"),
        ({"activation": "tanh"}, 'what comes out of activation "tanh" is not known'),
        ({"colour": "red", "encoder_name": "tu-resnet18"}, "smp.Unet cannot be built: .*colour"),
        ({"encoder_name": "resnet34"}, r"\d+ tensors missing: encoder.conv1.weight, "),
        ({"classes": 5}, r"of another shape: segmentation_head.0.weight \(4, 8, 3, 3\) instead of \(5, 8, 3, 3\)"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_is_an_error(
    unet: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        source(changed(unet, tmp_path / "net", **config)).describe()


def test_folders_that_are_not_there_or_broken_are_errors(
    unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        source(tmp_path / "nowhere").describe()
    with pytest.raises(ConfigError, match=r"has no config.json .*save_pretrained"):
        source(tmp_path).describe()
    cut = changed(unet, tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        source(cut).describe()
    (cut / "model.safetensors").write_bytes((unet / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is not a readable"):
        source(cut).describe()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder someone/net, and no such id: .*HF_HUB_OFFLINE"):
        source("someone/net").describe()


def test_an_id_of_the_hub_is_a_folder_in_the_cache(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "_downloaded", lambda *_: str(unet))
    found = source("someone/net")
    assert found.describe() == found.load(1).spec and found.describe().digest == source(unet).describe().digest


def test_without_smp_the_extra_is_named(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    for loader, what in (("smp", f"{unet}"), ("timm", f"resnet18@{unet}/model.safetensors")):
        with pytest.raises(ConfigError, match=r"needs the package segmentation-models-pytorch .*segbatch\[smp\]"):
            source(what, loader=loader).describe()


def test_pytorch_model_bin_is_read_without_running_it(unet: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "boom",)

    folder = changed(unet, tmp_path / "net")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_labels(Predictor(source(folder).load(1), 1).predict(photo()).semantic, theirs(unet, photo()))
    torch.save({**state, "more": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="save the tensors alone"):
        source(folder).describe()
    assert not (tmp_path / "boom").exists()


def test_describe_and_load_agree_in_every_process(unet: Path) -> None:
    found = source(unet)
    assert found.describe() == found.load(1).spec == pickle.loads(pickle.dumps(found)).describe()
    assert found.reference == f"smp:{unet}" == found.describe().name


def test_threads_share_a_network(unet: Path) -> None:
    segmenter = source(unet).load(1)
    batches = np.random.default_rng(0).standard_normal((4, 1, 64, 96, 3), np.float32)
    alone = [segmenter.forward(b) for b in batches]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i: found.update({i: segmenter.forward(batches[i])}), args=(i,)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(alone):
        np.testing.assert_array_equal(found[i], wanted)


@pytest.mark.parametrize(
    "options", [{}, {"encoder_depth": 3, "decoder_channels": (32, 16, 16), "decoder_attention_type": "scse"}]
)
def test_a_state_dict_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    net = network(**options)
    folder = saved(net, tmp_path / "folder")
    torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "net.ckpt")
    predictor = Predictor(source(f"unet/mobilenet_v2@{tmp_path / 'net.ckpt'}").load(1), 1)
    assert_same_labels(predictor.predict(photo()).semantic, theirs(folder, photo()))


@pytest.mark.long
def test_an_encoder_of_timm_under_a_u_net(tmp_path: Path) -> None:
    net = network("Unet", "tu-mobilenetv3_small_050", decoder_channels=(16, 16, 8, 8, 8))
    folder = saved(net, tmp_path / "folder")
    file = tmp_path / "net.safetensors"
    save_file(net.state_dict(), file)
    found = source(f"mobilenetv3_small_050@{file}", loader="timm")
    assert found.reference == f"timm:mobilenetv3_small_050@{file}"
    assert found.describe() == found.load(1).spec == pickle.loads(pickle.dumps(found)).describe()
    assert_same_labels(Predictor(found.load(1), 1).predict(photo()).semantic, theirs(folder, photo()))
    for what in (f"unet/mobilenetv3_small_050@{file}", f"Unet/tu-mobilenetv3_small_050@{file}"):
        assert source(what, loader="timm").describe().digest == found.describe().digest
    file.with_suffix(".safetensors.toml").write_text('classes = ["a", "b", "c", "d"]')
    assert found.describe().classes.name_of(1) == "b"


@pytest.mark.parametrize(
    ("loader", "what", "message"),
    [
        ("timm", "resnet18", "names no encoder and file .*timm:ENCODER@FILE"),
        ("timm", "resnet18@/nowhere.pth", "nowhere"),
        ("timm", "resnet81@{file}", "smp.Unet cannot be built: Unknown model"),
        ("timm", "resnet18@{file}", "tensors missing: encoder.model."),
        ("smp", "unet/resnet34@{file}", "tensors missing: encoder.conv1.weight, "),
        (
            "smp",
            "dpt/tu-vit_tiny_patch16_224@{file}",
            "is no DPT of smp's: it lacks the tensor segmentation_head.head.4",
        ),
        ("smp", "vnet/resnet18@{file}", "unknown architecture vnet; did you mean unet"),
    ],
)
def test_wrong_references_are_errors(unet: Path, loader: str, what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(what.format(file=unet / "model.safetensors"), loader=loader).describe()
