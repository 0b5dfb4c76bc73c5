"""The loader of transformers against transformers itself."""

import functools
import json
import pickle
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

hf = pytest.importorskip("transformers")
import hf_networks  # noqa: E402
import torch  # noqa: E402
from hf_networks import MADE, NAMES, THINGS, edit, photo  # noqa: E402

from segbatch.codecs import rle  # noqa: E402
from segbatch.errors import ConfigError, DataError  # noqa: E402
from segbatch.inference.pipeline import Predictor  # noqa: E402
from segbatch.models import hf_output, registry  # noqa: E402
from segbatch.models.base import Geometry  # noqa: E402
from segbatch.models.hf import HfSource  # noqa: E402
from segbatch.models.hf_families import FAMILIES  # noqa: E402
from segbatch.records import ClassInfo, ClassTable, Prediction  # noqa: E402

pytestmark = pytest.mark.long

Photo = NDArray[np.uint8]
Folders = Callable[[str], Path]

ALL = [*MADE, "oneformer"]
SEMANTIC = [n for n in ALL if n != "rf_detr"]
UNIVERSAL = ["mask2former", "maskformer", "detr", "eomt", "eomt_dinov3", "oneformer"]
LOW = {"threshold": 0.1, "overlap_mask_area_threshold": 0.1}
KEYS = {"threshold": "min_score", "overlap_mask_area_threshold": "overlap"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    hf.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folder of a tiny network by its name; each is written once."""
    root = tmp_path_factory.mktemp("hf")

    def find(name: str) -> Path:
        return root / name if (root / name).exists() else hf_networks.write(name, root / name)

    return find


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Folders:
    """A copy of a folder, to be changed."""
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name))


def loaded(folder: Path, keys: str = "", classes: str = "") -> Any:
    return registry.source(f"hf:{folder}{keys}", classes).load(1)


def known(name: str, task: str) -> dict[str, float]:
    """Low thresholds, as far as the library has them for this network and task."""
    if name in ("eomt", "eomt_dinov3", "rf_detr") and task == "instance":
        return {"threshold": LOW["threshold"]}
    return {} if task == "semantic" else LOW


def keys(name: str, task: str) -> str:
    return f"?task={task}" + "".join(f"&{KEYS[k]}={v}" for k, v in known(name, task).items())


@functools.cache
def network_of(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    autos = {"semantic": hf.AutoModelForSemanticSegmentation, "instance": hf.AutoModelForInstanceSegmentation}
    auto = autos.get(FAMILIES[kind].default or "", hf.AutoModelForUniversalSegmentation)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


class Library:
    """transformers' own way from a photo to a result."""

    def __init__(self, folder: Path, task: str) -> None:
        self.network = network_of(folder)
        self.text = {"task_inputs": [task]} if self.network.config.model_type == "oneformer" else {}
        self.processor = (hf.AutoProcessor if self.text else hf.AutoImageProcessor).from_pretrained(folder)
        self.post = getattr(self.processor, f"post_process_{task}_segmentation")

    def __call__(self, rgb: Photo, **arguments: Any) -> Any:
        fed = self.processor(images=[Image.fromarray(rgb)], return_tensors="pt", **self.text)
        with torch.inference_mode():
            out = self.network(**fed)
            return self.post(out, target_sizes=[rgb.shape[:2]], **arguments)[0]


def categories(prediction: Prediction) -> NDArray[np.int64]:
    """Class of each pixel of a panoptic prediction; -1 for void."""
    assert prediction.panoptic is not None and prediction.segments is not None
    return np.array([-1, *(s.category_id for s in prediction.segments)])[prediction.panoptic]


def categories_of(result: dict[str, Any]) -> NDArray[np.int64]:
    """The same of the library's."""
    ids = result["segmentation"].numpy()
    classes = np.full(ids.shape, -1)
    for segment in result["segments_info"]:
        classes[ids == segment["id"]] = segment["label_id"]
    return classes


# -- the same as the library ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", SEMANTIC)
def test_label_maps_are_the_librarys(folders: Folders, name: str) -> None:
    wanted = Library(folders(name), "semantic")(photo()).numpy()
    segmenter = loaded(folders(name), "?task=semantic")
    got = Predictor(segmenter, 1).predict(photo())
    assert got.semantic is not None and got.semantic.dtype == np.uint16
    np.testing.assert_array_equal(got.semantic, wanted)
    assert len(np.unique(wanted)) > 1 or name == "mobilevit"
    assert (segmenter.spec.output == "own") == (name in ("oneformer", "eomt-pieces"))


@pytest.mark.parametrize("name", UNIVERSAL)
def test_panoptic_segments_are_the_librarys(folders: Folders, name: str) -> None:
    result = Library(folders(name), "panoptic")(photo(), **LOW)
    got = Predictor(loaded(folders(name), keys(name, "panoptic")), 1).predict(photo())
    np.testing.assert_array_equal(categories(got), categories_of(result))
    assert got.segments and got.panoptic is not None and got.panoptic.dtype == np.uint16
    assert [s.id for s in got.segments] == list(range(1, len(got.segments) + 1))
    for number, segment in enumerate(got.segments, 1):
        counts = rle.encode(got.panoptic == number)
        assert (segment.area, segment.bbox_xywh) == (rle.area(counts), rle.bbox(counts, *photo().shape[:2]))
    if name != "oneformer":  # it says which classes are things, so stuff is joined
        assert len(got.segments) == len(result["segments_info"])


@pytest.mark.parametrize("name", ["mask2former", "maskformer", "rf_detr"])
def test_masks_of_instances_that_overlap_are_the_librarys(folders: Folders, name: str) -> None:
    result = Library(folders(name), "instance")(photo(), return_binary_maps=True, **known(name, "instance"))
    wanted = sorted(zip(result["segments_info"], result["segmentation"].numpy(), strict=True), key=_score)
    got = Predictor(loaded(folders(name), keys(name, "instance")), 1).predict(photo()).instances
    assert got is not None and len(got) == len(wanted) > 2
    for instance, (info, mask) in zip(got, wanted, strict=True):
        assert (instance.category_id, instance.score) == (info["label_id"], info["score"])
        np.testing.assert_array_equal(rle.decode(instance.counts, *mask.shape), mask)
        assert (instance.area, instance.iscrowd) == (mask.sum(), False)


def _score(pair: Any) -> float:
    return -float(pair[0]["score"])


@pytest.mark.parametrize("name", ["detr", "eomt", "eomt_dinov3", "oneformer"])
def test_maps_of_instances_are_the_librarys(folders: Folders, name: str) -> None:
    result = Library(folders(name), "instance")(photo(), **known(name, "instance"))
    ids = result["segmentation"].numpy()
    seen = sorted((i for i in result["segments_info"] if (ids == i["id"]).any()), key=lambda i: -float(i["score"]))
    got = Predictor(loaded(folders(name), keys(name, "instance")), 1).predict(photo()).instances
    assert got is not None and len(got) == len(seen) > 0
    assert [(i.id, i.category_id, i.score) for i in got] == [
        (n, s["label_id"], s["score"]) for n, s in enumerate(seen, 1)
    ]
    for instance, info in zip(got, seen, strict=True):
        np.testing.assert_array_equal(rle.decode(instance.counts, *ids.shape), ids == info["id"])


@pytest.mark.parametrize(
    ("name", "task"), [("segformer", "semantic"), ("mask2former", "panoptic"), ("eomt", "semantic")]
)
def test_a_real_photo_gives_what_the_library_gives(
    folders: Folders, shared_data: Callable[[str], Path], name: str, task: str
) -> None:
    files = sorted(shared_data("data/coco_tiny").rglob("*.jpg"))
    rgb = np.asarray(Image.open(files[0]).convert("RGB"))
    got = Predictor(loaded(folders(name), keys(name, task)), 1).predict(rgb)
    result = Library(folders(name), task)(rgb, **known(name, task))
    if task == "semantic":
        np.testing.assert_array_equal(got.semantic, result.numpy())
    else:
        np.testing.assert_array_equal(categories(got), categories_of(result))


def test_a_photo_smaller_than_the_scores_too(folders: Folders) -> None:
    small = photo(9, 7)
    for name in ("upernet-convnext", "mask2former", "oneformer"):
        wanted = Library(folders(name), "semantic")(small).numpy()
        np.testing.assert_array_equal(
            Predictor(loaded(folders(name), "?task=semantic"), 1).predict(small).semantic, wanted
        )


def test_pixels_that_are_no_photo_are_told_to_the_network(copy: Folders) -> None:
    folder = copy("mask2former")
    edit(folder, "preprocessor_config.json", pad_size={"height": 96, "width": 128})
    segmenter = loaded(folder, keys("mask2former", "panoptic"))
    fed, size = segmenter.prepare(photo())
    assert fed.shape == (4, 96, 128) and size == (96, 128) and 0 < fed[3].mean() < 1
    got = Predictor(segmenter, 1).predict(photo())
    np.testing.assert_array_equal(categories(got), categories_of(Library(folder, "panoptic")(photo(), **LOW)))


def test_several_threads_and_photos_at_once(folders: Folders) -> None:
    for name, task in (("segformer", "semantic"), ("mask2former", "panoptic"), ("oneformer", "instance")):
        predictor = Predictor(loaded(folders(name), keys(name, task)), 3)
        photos = [np.roll(photo(), 7 * i, 1) for i in range(3)]
        alone = [predictor.predict(p) for p in photos]
        start = threading.Barrier(3)

        def work(some: list[Photo], start: Any = start, predictor: Predictor = predictor) -> list[Prediction]:
            start.wait()
            return [predictor.finish(r) for r in predictor.forward([predictor.prepare(p) for p in some])]

        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(work, [photos] * 3))
        for predictions in together:
            for one, other in zip(alone, predictions, strict=True):
                assert _close(one, other)


def _close(one: Prediction, other: Prediction) -> bool:
    """Equal but for pixels whose best two classes are as good: batches of other sizes are summed in another order."""
    if one.semantic is not None and other.semantic is not None:
        return bool((one.semantic != other.semantic).mean() < 0.002)
    if one.panoptic is not None:
        return bool((categories(one) != categories(other)).mean() < 0.002)
    assert one.instances is not None and other.instances is not None
    return [i.category_id for i in one.instances] == [i.category_id for i in other.instances]


# -- results -------------------------------------------------------------------------------------------------------

TABLE = ClassTable(tuple(ClassInfo(i + 10, n, isthing=n in THINGS) for i, n in enumerate(NAMES)))


def result_of(ids: list[list[int]], *labels: tuple[int, int]) -> dict[str, Any]:
    infos = [{"id": i, "label_id": label, "score": 0.5} for i, label in labels]
    return {"segmentation": torch.tensor(ids), "segments_info": infos}


def test_stuff_of_one_class_is_one_segment() -> None:
    ids = [[-1, 0, 0, 1], [2, 2, 3, 1]]
    index_map, segments = hf_output.panoptic(result_of(ids, (0, 0), (1, 2), (2, 0), (3, 2)), TABLE)
    assert index_map.tolist() == [[0, 1, 1, 2], [1, 1, 3, 2]]
    assert [(s.id, s.category_id, s.area, s.bbox_xywh) for s in segments] == [
        (1, 10, 4.0, (0.0, 0.0, 3.0, 2.0)),
        (2, 12, 2.0, (3.0, 0.0, 1.0, 2.0)),
        (3, 12, 1.0, (2.0, 1.0, 1.0, 1.0)),
    ]


def test_without_things_nothing_is_joined() -> None:
    plain = ClassTable(tuple(replace(c, isthing=False) for c in TABLE.classes))
    index_map, segments = hf_output.panoptic(result_of([[1, 2, 0]], (1, 0), (2, 0)), plain)
    assert index_map.tolist() == [[1, 2, 0]] and len(segments) == 2


def test_nothing_found_is_void() -> None:
    index_map, segments = hf_output.panoptic(result_of([[-1, -1]]), TABLE)
    assert index_map.tolist() == [[0, 0]] and segments == ()
    assert hf_output.instances(result_of([[-1, -1]]), TABLE, (1, 2)) == ()


def test_a_class_without_a_name_is_an_error_of_the_photo() -> None:
    for make in (hf_output.panoptic, lambda r, t: hf_output.instances(r, t, (1, 1))):
        with pytest.raises(DataError, match="class 9, its class table has 6"):
            make(result_of([[0]], (0, 9)), TABLE)
    with pytest.raises(DataError, match="class 6"):
        hf_output.label_map(torch.tensor([[6]]), TABLE)
    assert hf_output.label_map(torch.tensor([[6]]), ClassTable(())).tolist() == [[6]]


def test_joined_stuff_is_what_the_library_fuses(folders: Folders, copy: Folders) -> None:
    folder = copy("maskformer")
    side_car(folder, 'things = ["sky"]')
    got = Predictor(loaded(folder, keys("maskformer", "panoptic")), 1).predict(photo())
    fused = Library(folder, "panoptic")(photo(), label_ids_to_fuse={1, 2, 3, 4, 5}, **LOW)
    apart = Library(folder, "panoptic")(photo(), **LOW)
    np.testing.assert_array_equal(categories(got), categories_of(apart))
    assert got.segments is not None
    assert len(got.segments) == len({s["id"] for s in fused["segments_info"]}) < len(apart["segments_info"])


def test_not_a_number_is_an_error_of_the_photo(folders: Folders) -> None:
    segmenter = loaded(folders("mask2former"), "?task=panoptic")
    raw = segmenter.forward(segmenter.prepare(photo())[0][None])[0]
    raw["class_queries_logits"] = raw["class_queries_logits"] * float("nan")
    with pytest.raises(DataError, match="not a number"):
        segmenter.finish(raw, Geometry(61, 83, 64, 87, 64, 87))


@pytest.mark.parametrize("name", ["segformer", "mask2former", "eomt-pieces", "mobilevit", "rf_detr"])
def test_photos_of_extreme_sides(folders: Folders, name: str) -> None:
    predictor = Predictor(loaded(folders(name), "?task=semantic" if name == "mask2former" else ""), 1)
    for height, width in ((1, 1), (3, 200), (200, 1)):
        rgb = np.full((height, width, 3), 100, np.uint8)
        got = predictor.predict(rgb)
        assert got.semantic is None or got.semantic.shape == (height, width)


def test_a_strip_is_not_blown_up(folders: Folders) -> None:
    with pytest.raises(DataError, match="too large to be fed"):
        loaded(folders("mobilevit")).prepare(np.zeros((1, 20000, 3), np.uint8))


# -- what is written -----------------------------------------------------------------------------------------------


def side_car(folder: Path, text: str) -> None:
    Path(f"{folder}.toml").write_text(text)


def test_the_spec_says_what_it_is(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders("segformer") / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia-sfl\n---\n# B0\n")
    source = registry.source(f"hf:{folders('segformer')}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = source.describe()
    monkeypatch.undo()
    assert (spec.task, spec.output, spec.name, spec.licence) == ("semantic", "logits", source.reference, "nvidia-sfl")
    assert [(c.label_id, c.name) for c in spec.classes.classes] == list(enumerate(NAMES))
    assert (spec.input.resize, spec.input.height, spec.input.width) == ("own", 64, 64)
    copied = pickle.loads(pickle.dumps(source))
    assert copied == source and copied.load(1).spec == spec == copied.describe()


def test_placeholders_name_nothing(copy: Folders, tmp_path: Path) -> None:
    folder = copy("mask2former")
    edit(folder, "config.json", id2label={str(i): f"LABEL_{i}" for i in range(6)})
    assert HfSource(f"{folder}?task=semantic").describe().classes == ClassTable(())
    with pytest.raises(ConfigError, match="does not name its classes"):
        HfSource(f"{folder}?task=panoptic").describe()
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdef"))
    spec = HfSource(f"{folder}?task=panoptic", str(names)).describe()
    assert [c.name for c in spec.classes.classes] == list("abcdef")
    names.write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"2 classes, .* 6 outputs"):
        HfSource(f"{folder}?task=panoptic", str(names)).describe()


def test_names_that_are_there_twice_are_told_apart(copy: Folders) -> None:
    folder = copy("segformer")
    edit(folder, "config.json", id2label={str(i): n for i, n in enumerate("ababca")})
    names = [c.name for c in HfSource(str(folder)).describe().classes.classes]
    assert names == ["a", "b", "a (2)", "b (3)", "c", "a (5)"]
    edit(folder, "config.json", id2label={"0": "a", "2": "b"})
    with pytest.raises(ConfigError, match="not 0, 1, 2"):
        HfSource(str(folder)).describe()


def test_label_ids_of_a_side_car_are_what_is_written(copy: Folders) -> None:
    folder = copy("eomt-pieces")
    plain = Predictor(loaded(folder), 1).predict(photo()).semantic
    side_car(folder, f"classes = {json.dumps(NAMES)}\nlabel_ids = [1, 2, 3, 4, 5, 900]\nlicence = 'MIT'")
    segmenter = loaded(folder)
    got = Predictor(segmenter, 1).predict(photo()).semantic
    np.testing.assert_array_equal(got, np.array([1, 2, 3, 4, 5, 900], np.uint16)[plain])
    assert segmenter.spec.licence == "MIT"


# -- which task ----------------------------------------------------------------------------------------------------


def test_the_task_where_nobody_says(folders: Folders, copy: Folders) -> None:
    wanted = {"dpt": "semantic", "detr": "panoptic", "rf_detr": "instance", "eomt-pieces": "semantic"}
    wanted["oneformer"] = "panoptic"  # its class file knows things and stuff
    for name, task in wanted.items():
        assert HfSource(str(folders(name))).describe().task == task
    folder = copy("mask2former")
    with pytest.raises(ConfigError, match=r"trained for \(add \?task= and one of panoptic, instance, semantic\)"):
        HfSource(str(folder)).describe()
    side_car(folder, 'things = ["car", "person"]')
    assert HfSource(str(folder)).describe().task == "panoptic"
    side_car(folder, 'task = "instance"\nmin_score = 0.2')
    assert HfSource(str(folder)).describe().task == "instance"


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("segformer", "?task=panoptic", "SegformerForSemanticSegmentation has no task panoptic"),
        ("rf_detr", "?task=semantic", "no task semantic"),
        ("eomt-pieces", "?task=panoptic", "no task panoptic on photos that its image processor cuts"),
        ("segformer", "?min_score=0.5", "no min_score for the semantic task"),
        ("eomt", "?task=instance&overlap=0.5", "no overlap for the instance task"),
        ("detr", "?min_score=2", "min_score = '2'"),
        ("detr", "?taks=panoptic", "unknown key taks; did you mean task"),
        ("detr", "?revision=main", "a folder has no revisions"),
    ],
)
def test_keys_that_do_not_go_with_the_model(folders: Folders, name: str, keys: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        HfSource(f"{folders(name)}{keys}").describe()


def test_a_folder_may_have_a_question_mark(folders: Folders, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(folders("detr"), tmp_path / "what?"))
    assert HfSource(str(odd)).describe().task == "panoptic"
    assert HfSource(f"{odd}?task=semantic").describe().task == "semantic"


def test_the_digest_follows_all_that_decides(copy: Folders) -> None:
    folder = copy("detr")

    def digest(keys: str = "") -> str:
        return HfSource(f"{folder}{keys}").describe().digest

    seen = [digest(), digest("?task=semantic"), digest("?min_score=0.3")]
    side_car(folder, 'things = ["car"]')
    seen.append(digest())
    edit(folder, "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    seen.append(digest())
    edit(folder, "config.json", activation_function="gelu")
    seen.append(digest())
    network = hf.DetrForSegmentation.from_pretrained(folder)
    network.mask_head.output_conv.bias.data += 1
    network.save_pretrained(folder)
    seen.append(digest())
    assert len(set(seen)) == len(seen)
    (folder / "README.md").write_text("# words")
    assert digest() == seen[-1]


# -- files ---------------------------------------------------------------------------------------------------------


def test_weights_in_parts_or_as_a_torch_file_are_the_same(folders: Folders, tmp_path: Path) -> None:
    source = folders("segformer")
    wanted = Predictor(loaded(source), 1).predict(photo()).semantic
    network = hf.SegformerForSemanticSegmentation.from_pretrained(source)
    parts, pickled = (Path(shutil.copytree(source, tmp_path / n)) for n in ("parts", "pickled"))
    for folder in (parts, pickled):
        (folder / "model.safetensors").unlink()
    network.save_pretrained(parts, max_shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    torch.save(network.state_dict(), pickled / "pytorch_model.bin")
    for folder in (parts, pickled):
        np.testing.assert_array_equal(Predictor(loaded(folder), 1).predict(photo()).semantic, wanted)
    next(parts.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="lacks model-"):
        HfSource(str(parts)).describe()


def test_half_precision_is_run_in_single(copy: Folders) -> None:
    folder = copy("segformer")
    hf.SegformerForSemanticSegmentation.from_pretrained(folder).half().save_pretrained(folder)
    segmenter = loaded(folder)
    assert segmenter.forward(segmenter.prepare(photo())[0][None]).dtype == np.float32
    assert {p.dtype for p in segmenter._net.parameters()} == {torch.float32}


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_a_torch_file_with_code_is_refused(copy: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("segformer")
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        loaded(folder)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("decode_head.classifier.weight"), "1 tensors missing: decode_head.classifier.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), "1 tensors unknown: extra"),
        (
            lambda s: s.update({"decode_head.classifier.bias": torch.zeros(9)}),
            r"of another shape: decode_head.classifier.bias \(9,\) instead of \(6,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(copy: Folders, change: Callable[[Any], Any], problem: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy("segformer")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=problem):
        loaded(folder)


@pytest.mark.parametrize(
    ("name", "patterns"), [("dpt", ("residual_layer1", "auxiliary_head")), ("upernet-swin", ("auxiliary_head",))]
)
def test_tensors_that_nothing_reads_may_be_missing(copy: Folders, name: str, patterns: tuple[str, ...]) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(name)
    wanted = Predictor(loaded(folder), 1).predict(photo()).semantic
    state = load_file(folder / "model.safetensors")
    unread = [k for k in state if "auxiliary_head" in k or "layers.0.residual_layer1" in k]
    assert all(any(p in k for k in unread) for p in patterns)
    save_file({k: v for k, v in state.items() if k not in unread}, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(Predictor(loaded(folder), 1).predict(photo()).semantic, wanted)


def test_weights_that_are_cut(copy: Folders) -> None:
    folder = copy("segformer")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        loaded(folder)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(copy: Folders, missing: str) -> None:
    folder = copy("segformer")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}"):
        HfSource(str(folder)).describe()


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Net"}}, "brings code of its own"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}, "brings code of its own"),
        ("config.json", {"attn_implementation": "owner/kernel"}, "brings code of its own"),
        ("config.json", {"sub": [{"auto_map": {"x": "y"}}]}, "brings code of its own"),
        ("config.json", {"quantization_config": {"bits": 4}}, "is quantised"),
        ("config.json", {"model_type": "bert"}, "bert of config.json is no segmentation network"),
        ("config.json", {"model_type": "segfomer"}, "did you mean segformer"),
        ("config.json", {"architectures": ["SegformerForImageClassification"]}, "not a SegformerForSemanticSegm"),
        ("config.json", {"depths": "many"}, "cannot be loaded: .* 'depths' .* 'many'"),
        ("adapter_config.json", {"peft_type": "LORA"}, "is an adapter"),
    ],
)
def test_folders_that_are_refused(copy: Folders, file: str, changes: dict[str, Any], problem: str) -> None:
    folder = copy("segformer")
    edit(folder, file, **changes)
    with pytest.raises(ConfigError, match=problem):
        loaded(folder)


def test_an_archive_is_read_like_a_folder(folders: Folders, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for file in folders("segformer").iterdir():
            archive.write(file, f"net/{file.name}")
    reference = f"hf:{tmp_path}/m.zip!/net"
    assert registry.source(reference).describe().digest == HfSource(str(folders("segformer"))).describe().digest
    got = Predictor(registry.source(reference).load(1), 1).predict(photo()).semantic
    np.testing.assert_array_equal(got, Predictor(loaded(folders("segformer")), 1).predict(photo()).semantic)


def test_an_id_is_read_from_the_cache(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder owner/net, and no such id: .*HF_HUB_OFFLINE is set"):
        HfSource("owner/net").describe()
    commit = "0" * 40
    shutil.copytree(folders("segformer"), tmp_path / "models--owner--net" / "snapshots" / commit)
    (tmp_path / "models--owner--net" / "refs").mkdir()
    for branch in ("main", "old"):
        (tmp_path / "models--owner--net" / "refs" / branch).write_text(commit)
    spec = HfSource("owner/net?revision=old").load(1).spec
    assert spec.source == "https://huggingface.co/owner/net"
    assert (
        spec.digest == HfSource("owner/net").describe().digest == HfSource(str(folders("segformer"))).describe().digest
    )
    with pytest.raises(ConfigError, match="there is no folder"):
        HfSource("./owner/net").describe()


@pytest.mark.parametrize("package", ["transformers", "torchvision"])
def test_a_missing_package_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package} .*segbatch\[hf\]"):
        loaded(folders("segformer"))


def test_every_segmentation_network_of_the_library_is_known() -> None:
    from transformers.models.auto import modeling_auto as auto

    theirs = {
        **auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        **auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
        **auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
        **auto.MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
    }
    theirs.pop("videomt")  # videos
    assert {k: f.network for k, f in FAMILIES.items() if k in theirs} == theirs
    assert all(hasattr(hf, f.network) for f in FAMILIES.values())
