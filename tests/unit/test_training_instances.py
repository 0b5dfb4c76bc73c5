"""Training of instance and panoptic networks: labels, crops, the loop, figures; and data with things to train on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import generators
import numpy as np
import pytest
import torch
import toy_training as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.config import parse
from segbatch.datasets import drawn_shelves
from segbatch.datasets.image_masks import ImageMasks
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError, DataError, StoppedError
from segbatch.inference.pipeline import Predictor
from segbatch.models import architectures
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.records import ClassInfo, ClassTable, Sample, Task
from segbatch.training import TrainConfig, TrainProgress, train
from segbatch.training.config import DataConfig
from segbatch.training.crops import FEWEST, SLIVER, CropStream
from segbatch.training.losses import cross_entropy
from segbatch.training.samples import VOID, Labelled, SampleSet
from segbatch.training.separation import separation_weights
from segbatch.training.truth import Thing

STILL = DataConfig(scale=(1.0, 1.0), flip=False, brightness=0.0, contrast=0.0, color=0.0)
ANY_SIZE = InputSpec(layout="nhwc")
KINDS: dict[Task, str] = {"instance": "maskrcnn", "panoptic": "panoptic_fpn"}


def config(task: Task, root: str, out: Path, **changes: Any) -> TrainConfig:
    """A second's training of ``toy.BlobArchitecture``; ``a__b`` in ``changes`` is the key ``a.b``."""
    document: dict[str, Any] = {
        "out": str(out),
        "samples": root,
        "split": "train",
        "threads": 1,
        "checkpoint_every_s": 1000.0,
        "model": {"kind": KINDS[task], "short_side": 32},
        "data": {"crop": [32, 32]},
        "optim": {"epochs": 10, "batch_size": 4, "lr": 0.05, "dtype": "float32", "warmup_steps": 2, "ema": 0.9},
    }
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        (document[table] if table else document)[name] = value
    return parse(TrainConfig, document, "test")


@pytest.fixture(params=["instance", "panoptic"])
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Either task, its architecture replaced by one that is fast."""
    found: Task = request.param
    monkeypatch.setitem(architectures.ARCHITECTURES, KINDS[found], toy.BlobArchitecture(found))
    return found


def stop_after(steps: int) -> tuple[Callable[[TrainProgress], None], Callable[[], bool]]:
    seen: list[int] = []
    return lambda p: seen.append(p.step), lambda: seen[-1] >= steps


def full(thing: Thing, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A thing's mask on the whole photo."""
    mask = np.zeros(size, np.bool_)
    mask[thing.top : thing.top + thing.mask.shape[0], thing.left : thing.left + thing.mask.shape[1]] = thing.mask
    return mask


def things_of(found: Labelled) -> tuple[Thing, ...]:
    assert found.things is not None
    return found.things


class TestLabels:
    @pytest.mark.parametrize("task", ["instance", "panoptic"])
    def test_things_are_the_tables(self, tmp_path: Path, task: Task) -> None:
        samples = SampleSet(toy.toy_things(tmp_path), "val", 100, task)
        for index in range(3):
            labels = toy.draw(100 + index)[1]
            numbers, found = toy.pieces(np.equal(labels, toy.BRIGHT)), samples.get(index)
            masks = [full(t, toy.SIZE) for t in things_of(found)]
            assert len(masks) == numbers.max() and not any(t.iscrowd for t in things_of(found))
            assert {m.tobytes() for m in masks} == {np.equal(numbers, i + 1).tobytes() for i in range(len(masks))}
            for thing in things_of(found):
                rows, columns = np.nonzero(thing.mask)
                assert (rows.min(), columns.min()) == (0, 0)
                assert (rows.max() + 1, columns.max() + 1) == thing.mask.shape

    def test_an_instance_network_learns_things_only_a_panoptic_one_all(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        of_instances, panoptic = (SampleSet(root, "train", 1, t) for t in ("instance", "panoptic"))
        assert [c.name for c in of_instances.classes.classes] == ["bright"]
        assert {t.label for t in things_of(of_instances.get(0))} == {0} and of_instances.get(0).classes is None
        assert [c.name for c in panoptic.classes.classes] == ["dark", "bright"]
        assert {t.label for t in things_of(panoptic.get(0))} == {1}

    def test_the_class_map_of_panoptic_labels_is_that_of_the_label_map(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        for index in range(8):
            panoptic, semantic = (SampleSet(root, "train", 1, t).get(index) for t in ("panoptic", "semantic"))
            assert panoptic.classes is not None and panoptic.classes.dtype == np.int16
            assert semantic.classes is not None
            np.testing.assert_array_equal(panoptic.classes, semantic.classes)

    @pytest.mark.parametrize("task", ["instance", "panoptic"])
    def test_photos_are_turned_upright_with_their_things(self, tmp_path: Path, task: Task) -> None:
        rows = [toy.with_things(0), *(toy.with_things(0, sample_id=f"t{i}", exif_orientation=i) for i in (2, 6, 7))]
        samples = SampleSet(toy.write(tmp_path, rows), "train", 100, task)
        turns: list[Callable[[NDArray[Any]], NDArray[Any]]] = [
            np.fliplr,
            lambda a: np.rot90(a, -1),
            lambda a: a[::-1, ::-1].T,
        ]
        for index, turn in enumerate(turns, 1):
            plain, turned = samples.get(0), samples.get(index)
            np.testing.assert_array_equal(turned.image[..., 0], turn(plain.image[..., 0]))
            wanted = {turn(full(t, toy.SIZE)).tobytes() for t in things_of(plain)}
            assert {full(t, turned.image.shape[:2]).tobytes() for t in things_of(turned)} == wanted
            if plain.classes is not None and turned.classes is not None:
                np.testing.assert_array_equal(turned.classes, turn(plain.classes))

    @pytest.mark.parametrize("task", ["instance", "panoptic"])
    def test_groups_and_ignored_things_are_crowds_and_stuff_is_none(self, tmp_path: Path, task: Task) -> None:
        classes = ClassTable((*toy.CLASSES.classes, ClassInfo(7, "rider", isthing=True, ignore=True)))
        row = toy.with_things(0)
        for cell in ("instances", "segments"):
            (first, second, *rest) = row[cell]
            row[cell] = [{**first, "iscrowd": True}, {**second, "category_id": 7}, *rest]
        row["instances"].append({**row["instances"][-1], "id": 99, "category_id": toy.DARK})
        found = SampleSet(toy.write(tmp_path, [row], classes), "train", 1, task).get(0)
        assert [t.iscrowd for t in things_of(found)] == [True, True, *[False] * (len(row["instances"]) - 3)]
        if found.classes is not None:
            ignored = full(things_of(found)[1], toy.SIZE)
            assert (found.classes[ignored] == VOID).all()

    @pytest.mark.parametrize(
        ("task", "changes", "code", "words"),
        [
            ("instance", {"instances": None}, "missing-label", "train/9 has no instances"),
            ("panoptic", {"panoptic": None, "segments": None}, "missing-label", "train/9 has no panoptic map"),
            ("instance", {"instances": [("category_id", 77)]}, "unknown-id", r"train/9 has label ids \[77\]"),
            ("panoptic", {"segments": [("category_id", 77)]}, "unknown-id", r"train/9 has label ids \[77\]"),
            ("instance", {"instances": [("counts", b"0X1")]}, "size-mismatch", "train/9: the mask of instance 1"),
            ("panoptic", {"panoptic": np.ones((2, 3), np.uint16)}, "size-mismatch", "panoptic map of 6 pixels"),
            ("panoptic", {"panoptic": np.full(toy.SIZE, 99, np.uint16)}, "bad-panoptic", "train/9: its panoptic map"),
        ],
    )
    def test_a_sample_that_cannot_be_used_is_named(
        self, tmp_path: Path, task: Task, changes: dict[str, Any], code: str, words: str
    ) -> None:
        row = toy.with_things(9)
        for cell, value in changes.items():
            if isinstance(value, list):
                value = [{**row[cell][0], **dict(value)}, *row[cell][1:]]
            row[cell] = value
        root = toy.write(tmp_path, [toy.with_things(0), row])
        with pytest.raises(DataError, match=words) as caught:
            SampleSet(root, "train", 0, task).get(1)
        assert caught.value.code == code

    def test_classes_without_things_are_refused(self, tmp_path: Path) -> None:
        plain = ClassTable(tuple(dataclasses.replace(c, isthing=False) for c in toy.CLASSES.classes))
        root = toy.write(tmp_path, [toy.with_things(0)], plain)
        with pytest.raises(ConfigError, match=r"no class of .* is a thing.*mark the classes .* with isthing"):
            SampleSet(root, "train", 1, "instance")

    def test_the_cache_counts_masks(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        kept, anew = SampleSet(root, "train", 100, "panoptic"), SampleSet(root, "train", 0, "panoptic")
        kept.preload()
        anew.preload()
        first = kept.get(0)
        masks = sum(t.mask.size for t in things_of(first))
        assert first.nbytes == 16 * 24 * (3 + 2) + masks and masks <= 2 * 16 * 24
        assert kept.get(0) is first and anew.get(0) is not anew.get(0)


def stream(root: str, task: Task, data: DataConfig, size: tuple[int, int], spec: InputSpec = ANY_SIZE) -> CropStream:
    return CropStream(SampleSet(root, "train", 100, task), data, spec, size, 3)


class TestCrops:
    @settings(max_examples=12, deadline=None)
    @given(
        low=st.floats(0.3, 1.5),
        span=st.floats(1.0, 2.0),
        height=st.integers(5, 40),
        width=st.integers(5, 40),
        short_side=st.sampled_from([0, 11, 40]),
        elastic=st.sampled_from([0.0, 2.0]),
    )
    @pytest.mark.long
    def test_things_lie_where_the_class_map_says(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        low: float,
        span: float,
        height: int,
        width: int,
        short_side: int,
        elastic: float,
    ) -> None:
        root = toy.toy_things(tmp_path_factory.getbasetemp() / "crops")
        spec = InputSpec(height=short_side, resize="short-side", layout="nhwc") if short_side else ANY_SIZE
        data = DataConfig(scale=(low, low * span), elastic=elastic)
        found = stream(root, "panoptic", data, (height, width), spec).batch(0, 6)
        assert found.classes is not None and len(found.targets) == 6
        for classes, target in zip(found.classes, found.targets, strict=True):
            assert target.classes is not None
            np.testing.assert_array_equal(target.classes, classes)
            np.testing.assert_array_equal(target.masks.sum(0), classes == 1)  # no two overlap, none is missing
            assert target.masks.dtype == np.uint8 and target.masks.shape == (len(target.labels), height, width)
            assert set(target.labels.tolist()) <= {1}
            for mask, box in zip(target.masks, target.boxes.astype(int), strict=True):
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]

    def test_instance_and_panoptic_crops_show_the_same(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        data = DataConfig()
        one, other = (stream(root, t, data, (16, 16)).batch(0, 8) for t in ("instance", "panoptic"))
        np.testing.assert_array_equal(one.images, other.images)
        assert one.classes is None
        for mine, theirs in zip(one.targets, other.targets, strict=True):
            assert mine.classes is None
            assert {m.tobytes() for m in mine.masks} == {m.tobytes() for m in theirs.masks}

    @pytest.mark.parametrize(
        "spec",
        [
            InputSpec(height=40, resize="short-side", longest=50, divisor=8, layout="nhwc"),
            InputSpec(height=32, width=32, resize="letterbox", layout="nhwc"),
            InputSpec(height=24, width=32, resize="stretch", layout="nhwc"),
            InputSpec(divisor=8, layout="nhwc"),
        ],
        ids=lambda s: str(s.resize),
    )
    def test_a_still_crop_of_the_whole_photo_is_what_the_network_is_fed_later(
        self, tmp_path: Path, spec: InputSpec
    ) -> None:
        root = toy.write(tmp_path, [toy.with_things(0)])
        predictor = Predictor(Nothing(spec), 1)
        fed = predictor.prepare(toy.draw(0)[0])
        at = fed.geometry
        found = stream(root, "instance", STILL, (at.fed_height, at.fed_width), spec).batch(0, 1)
        np.testing.assert_array_equal(found.images[0], fed.tensor[: at.fed_height, : at.fed_width])
        union = found.targets[0].masks.max(0)
        bright = cv2.resize(
            (toy.draw(0)[1] == toy.BRIGHT).astype(np.float32),
            (at.fed_width, at.fed_height),
            interpolation=cv2.INTER_LINEAR,
        )
        assert union[bright > 0.9].min() == 1 and union[bright < 0.1].max() == 0

    def test_slivers_are_crowds(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        samples = SampleSet(root, "train", 100, "instance")
        found = CropStream(samples, STILL, ANY_SIZE, (8, 8), 3)
        seen = {True: 0, False: 0}
        for number in range(40):
            whole = [full(t, toy.SIZE) for t in things_of(samples.get(found._sample_of(number)))]
            target = found.batch(number, 1).targets[0]
            for mask, iscrowd in zip(target.masks, target.iscrowd, strict=True):
                fits = [m.sum() for m in whole if contains(m, mask)]
                assert iscrowd in {bool(mask.sum() < FEWEST or mask.sum() / area < SLIVER) for area in fits}
                seen[bool(iscrowd)] += 1
        assert min(seen.values()) > 3

    def test_bent_crops_do_not_depend_on_how_they_are_asked_for(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        data = DataConfig(elastic=3.0, border_weight=2.0)
        whole, parts = stream(root, "semantic", data, (16, 16)).batch(0, 6), stream(root, "semantic", data, (16, 16))
        part = parts.batch(4, 2)
        for name in ("images", "classes", "borders"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[4:])

    def test_a_bent_photo_and_its_labels_stay_together(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path)
        straight, bent = (
            stream(root, "semantic", changed(STILL, elastic=e), (16, 24)).batch(0, 24) for e in (0.0, 2.0)
        )
        assert bent.classes is not None and straight.classes is not None
        assert 0.05 < (bent.classes != straight.classes).mean() < 0.5
        bright = bent.images.mean(-1) > straight.images.mean()
        known = bent.classes != VOID
        assert ((bent.classes == 1) == bright)[known].mean() > 0.93


def changed(data: DataConfig, **changes: Any) -> DataConfig:
    return data.model_copy(update=changes)


def contains(whole: NDArray[np.bool_], part: NDArray[np.uint8]) -> bool:
    """Whether the part is a window of the whole."""
    height, width = part.shape
    return any(
        np.array_equal(whole[top : top + height, left : left + width], part > 0)
        for top in range(whole.shape[0] - height + 1)
        for left in range(whole.shape[1] - width + 1)
    )


class Nothing:
    """A model that is never run."""

    def __init__(self, spec: InputSpec) -> None:
        self.spec = ModelSpec("nothing", "semantic", ClassTable(()), spec, "labels", "")

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        raise AssertionError("not to be run")


class TestSeparation:
    @settings(max_examples=15, deadline=None)
    @given(
        seed=st.integers(0, 1000), count=st.integers(0, 5), weight=st.floats(0.5, 20), sigma=st.sampled_from([1.0, 5.0])
    )
    def test_it_is_equation_2(self, seed: int, count: int, weight: float, sigma: float) -> None:
        rng = np.random.default_rng(seed)
        objects = np.zeros((17, 23), np.int32)
        for number in range(1, count + 1):
            y, x = rng.integers(0, 15), rng.integers(0, 20)
            objects[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = 3 * number
        pixels = np.argwhere(np.ones_like(objects, np.bool_))
        away = [
            np.sqrt(((pixels[:, None] - np.argwhere(objects == n)[None]) ** 2).sum(-1)).min(1).reshape(objects.shape)
            for n in np.unique(objects[objects > 0])
        ]
        wanted = np.zeros(objects.shape)
        if len(away) > 1:
            nearest = np.sort(away, 0)
            wanted = weight * np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * sigma**2))
        np.testing.assert_allclose(separation_weights(objects, weight, sigma), wanted, atol=1e-5 * weight)

    def test_the_loss_adds_it_to_the_classes_weights(self) -> None:
        torch.manual_seed(0)
        logits, weights = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 2.0, 0.5])
        classes, borders = torch.randint(-1, 3, (2, 4, 5)), torch.rand(2, 4, 5)
        known = classes != VOID
        each = (weights[classes.clamp_min(0)] + borders)[known]
        losses = -logits.log_softmax(1).movedim(1, -1)[known].gather(1, classes[known][:, None])[:, 0]
        wanted = (each * losses).sum() / each.sum()
        assert float(cross_entropy(logits, classes, weights, borders)) == pytest.approx(float(wanted), rel=1e-5)
        plain = cross_entropy(logits, classes, weights)
        torch.testing.assert_close(cross_entropy(logits, classes, weights, torch.zeros(2, 4, 5)), plain)
        nothing = cross_entropy(logits, torch.full((2, 4, 5), VOID), weights, borders)
        assert float(nothing) == 0.0

    def test_objects_are_the_tables_instances_or_else_connected_pieces(self, tmp_path: Path) -> None:
        data = changed(STILL, border_weight=10.0)
        labels = toy.draw(0)[1]
        for rows, name in (([toy.with_things(0)], "instances"), ([toy.row(0)], "pieces")):
            samples = SampleSet(toy.write(tmp_path / name, rows), "train", 1, "semantic", with_things=True)
            assert (samples.get(0).things is None) == (name == "pieces")
            found = CropStream(samples, data, ANY_SIZE, toy.SIZE, 0).batch(0, 1)
            assert found.borders is not None and found.borders[0].max() > 1
            wanted = separation_weights(toy.pieces(np.equal(labels, toy.BRIGHT)), 10.0, 5.0)
            np.testing.assert_array_equal(found.borders[0], wanted)

    @pytest.mark.long
    def test_a_network_is_trained_with_it(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path / "data")
        changes = {"model": {"kind": "unet", "width": 4, "depth": 2}, "data__border_weight": 2.0, "data__elastic": 1.0}
        changes |= {"data__crop": [16, 16], "optim__epochs": 8}
        result = train(config("instance", root, tmp_path / "out", **changes, optim__lr=0.02, val_split="val"))
        assert result.val_miou is not None and result.val_miou > 0.7

    def test_where_it_makes_no_sense_it_is_refused(self, tmp_path: Path) -> None:
        root = toy.toy_things(tmp_path / "data")
        for kind in ("maskrcnn", "color"):
            with pytest.raises(ConfigError, match=rf"border_weight is for .* semantic networks, which {kind} has not"):
                train(config("instance", root, tmp_path / "out", model={"kind": kind}, data__border_weight=1.0))
        plain = ClassTable(tuple(dataclasses.replace(c, isthing=False) for c in toy.CLASSES.classes))
        flat = toy.write(tmp_path / "flat", [toy.row(0)], plain)
        with pytest.raises(ConfigError, match=r"no class of .* is a thing"):
            train(config("instance", flat, tmp_path / "out", model={"kind": "unet"}, data__border_weight=1.0))


def figures(result: Any) -> list[float | None]:
    return [result.val_ap, result.val_ap50, result.val_pq]


class TestLoop:
    @pytest.mark.long
    def test_a_toy_task_is_learned_and_its_figures_recorded(self, tmp_path: Path, task: Task) -> None:
        root = toy.toy_things(tmp_path / "data")
        changes = {"val_split": "val", "val_every_epochs": 5}
        result = train(config(task, root, tmp_path / "out", **changes))
        found = [v for v in figures(result) if v is not None]
        assert len(found) == (2 if task == "instance" else 1) and found[-1] > 0.7
        assert result.val_miou is None and result.val_iou == {}
        log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
        name = "val_ap50" if task == "instance" else "val_pq"
        assert [e["step"] for e in log if name in e] == [10, 20, 20] and log[-1][name] == found[-1]
        again = train(config(task, root, tmp_path / "out", **changes), lambda _: pytest.fail("trained"))
        assert again == dataclasses.replace(result, resumed_from=result.steps)
        record = json.loads((tmp_path / "out" / "model.json").read_text())
        assert [c["name"] for c in record["classes"]] == (["bright"] if task == "instance" else ["dark", "bright"])

    @pytest.mark.long
    def test_an_interrupted_training_ends_as_an_uninterrupted_one(self, tmp_path: Path, task: Task) -> None:
        root = toy.toy_things(tmp_path / "data")
        changes = {"val_split": "val", "val_every_epochs": 4, "optim__epochs": 6}
        whole = train(config(task, root, tmp_path / "whole", **changes))
        for steps in (3, 9):
            with pytest.raises(StoppedError, match=f"after {steps} steps"):
                train(config(task, root, tmp_path / "cut", **changes), *stop_after(steps))
        resumed = train(config(task, root, tmp_path / "cut", **changes))
        assert (resumed.resumed_from, resumed.loss, *figures(resumed)) == (9, whole.loss, *figures(whole))
        mine, theirs = (torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("cut", "whole"))
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
        logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "cut")]
        assert [{**json.loads(a), "cpu_s": 0} for a in logs[0]] == [{**json.loads(b), "cpu_s": 0} for b in logs[1]]

    def test_the_loss_is_told_the_step(self, tmp_path: Path, task: Task) -> None:
        root = toy.toy_things(tmp_path / "data")
        train(config(task, root, tmp_path / "out", optim__epochs=2, optim__ema=0.0))
        architecture: Any = ARCHITECTURES[KINDS[task]]
        assert architecture.steps == [0, 1, 2, 3]

    def test_turned_photos_are_scored_on_their_stored_grid(self, tmp_path: Path, task: Task) -> None:
        rows = [toy.with_things(i) for i in range(8)]
        rows += [toy.with_things(100 + i, "val", exif_orientation=i) for i in range(1, 9)]
        result = train(config(task, toy.write(tmp_path / "data", rows), tmp_path / "out", val_split="val"))
        assert max(v for v in figures(result) if v is not None) > 0.65

    def test_validation_takes_limits_and_no_views(self, tmp_path: Path, task: Task) -> None:
        root = toy.toy_things(tmp_path / "data")
        limits = {"min_score": 0.95}  # everything is found with .9
        result = train(config(task, root, tmp_path / "out", val_split="val", val_inference=limits))
        assert max(v for v in figures(result) if v is not None) < 0.6
        with pytest.raises(ConfigError, match="val_inference: validation knows no tiles"):
            config(task, root, tmp_path / "out", val_inference={"flip": True})


@pytest.mark.parametrize("kind", ["maskrcnn", "panoptic_fpn", "instancefcn"])
@pytest.mark.long
def test_the_built_in_networks_resume_bit_by_bit(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchvision", reason="the extra pretrained is not installed")
    root = toy.toy_things(tmp_path / "data", train=2, val=1)
    size = {"width": 0.05, "short_side": 32, "longest": 64}
    options: dict[str, Any] = {
        "model": {"kind": kind, **size, **({} if kind == "instancefcn" else {"norm": "group", "regions": 8})},
        "optim": {"epochs": 2, "batch_size": 2, "lr": 1e-3, "dtype": "float32", "warmup_steps": 2, "ema": 0.9},
        "val_split": "val",
        "val_inference": {"stuff_area": 1},
    }
    train(config("instance", root, tmp_path / "whole", **options))
    with pytest.raises(StoppedError):
        train(config("instance", root, tmp_path / "cut", **options), *stop_after(1))
    assert train(config("instance", root, tmp_path / "cut", **options)).resumed_from == 1
    mine, theirs = (torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("cut", "whole"))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


# -- data ------------------------------------------------------------------------------------------------------------


def objects_tree(root: Path, objects: NDArray[np.uint16] | None, mask: NDArray[np.uint8]) -> Path:
    """One photo with its mask and, perhaps, its objects; cart is a thing."""
    generators.save(root / "images" / "a.png", generators.photo(0, mask.shape))
    generators.save(root / "masks" / "a.png", mask)
    if objects is not None:
        generators.save(root / "instances" / "a.png", objects)
    (root / "classes.toml").write_text(
        generators.CLASSES_TOML.replace('name = "cart"', 'name = "cart"\nisthing = true')
    )
    return root


def only_sample(root: Path) -> Sample:
    (item,) = ImageMasks().items(Tree.of(str(root)), ())
    (found,) = ImageMasks().read(item)
    return found


class TestObjectMaps:
    MASK = np.array([[0, 3, 3, 3], [0, 3, 3, 3], [255, 255, 0, 0]], np.uint8)

    def test_objects_groups_stuff_and_void(self, tmp_path: Path) -> None:
        objects = np.array([[0, 9, 500, 0], [7, 9, 500, 0], [7, 9, 0, 7]], np.uint16)
        found = only_sample(objects_tree(tmp_path, objects, self.MASK))
        assert found.instances is not None and found.segments is not None and found.panoptic is not None
        assert [(i.id, i.category_id, i.area, i.iscrowd) for i in found.instances] == [
            (7, 0, 2.0, False),  # an object is one whatever its class
            (9, 3, 2.0, False),
            (500, 3, 2.0, False),
            (65539, 3, 2.0, True),
        ]
        assert [s.id for s in found.segments] == [7, 9, 500, 65536, 65539]
        ids = np.array([0, *(s.id for s in found.segments)])[found.panoptic]
        wanted = [[65536, 9, 500, 65539], [7, 9, 500, 65539], [0, 0, 65536, 7]]
        assert ids.tolist() == wanted
        for instance in found.instances:
            mask = rle.decode(instance.counts, 3, 4)
            np.testing.assert_array_equal(mask, ids == instance.id)
        assert found.semantic is not None
        np.testing.assert_array_equal(found.semantic, self.MASK)

    def test_without_the_folder_there_is_no_such_task(self, tmp_path: Path) -> None:
        found = only_sample(objects_tree(tmp_path, None, self.MASK))
        assert found.instances is None and found.panoptic is None and found.segments is None

    @pytest.mark.parametrize(
        ("damage", "code", "words"),
        [
            ("missing", "missing-label", "instances/a.png is not there"),
            ("color", "label-type", "object map .* is in colour"),
            ("size", "size-mismatch", "is 2 x 2, its photo"),
            ("mixed", "mixed-object", r"the object 4 of .*instances/a.png lies on the label ids \[0, 3\]"),
        ],
    )
    def test_a_wrong_map_is_named(self, tmp_path: Path, damage: str, code: str, words: str) -> None:
        root = objects_tree(tmp_path, np.full((3, 4), 4, np.uint16), self.MASK)
        if damage == "missing":
            (root / "instances" / "a.png").rename(root / "instances" / "b.png")
        if damage == "color":
            generators.save(root / "instances" / "a.png", generators.photo(0, (3, 4)))
        if damage == "size":
            generators.save(root / "instances" / "a.png", np.ones((2, 2), np.uint16))
        with pytest.raises(DataError, match=words) as caught:
            only_sample(root)
        assert caught.value.code == code

    def test_a_changed_object_map_is_a_changed_item(self, tmp_path: Path) -> None:
        root = objects_tree(tmp_path, np.zeros((3, 4), np.uint16), self.MASK)
        (before,) = ImageMasks().items(Tree.of(str(root)), ())
        generators.save(root / "instances" / "a.png", np.where(self.MASK == 3, 1, 0).astype(np.uint16))
        (after,) = ImageMasks().items(Tree.of(str(root)), ())
        assert before.etag != after.etag


def test_every_product_and_gap_of_a_drawn_shelf_is_an_object() -> None:
    counts = []
    for seed in range(6):
        drawn = drawn_shelves.shelf(np.random.default_rng(seed), 96, 128)
        assert drawn.objects.shape == drawn.mask.shape == (96, 128)
        things = np.isin(drawn.mask, (drawn_shelves.PRODUCT, drawn_shelves.GAP))
        np.testing.assert_array_equal(drawn.objects > 0, things)
        ids = np.unique(drawn.objects)[1:]
        assert all(len(np.unique(drawn.mask[drawn.objects == i])) == 1 for i in ids)
        apart = sum(toy.pieces(drawn.mask == label).max() for label in (drawn_shelves.PRODUCT, drawn_shelves.GAP))
        counts.append((len(ids), apart))
    assert sum(objects for objects, _ in counts) > 1.5 * sum(pieces for _, pieces in counts)  # neighbours touch


def test_drawn_shelves_serve_all_three_tasks(tmp_path: Path) -> None:
    drawn_shelves.draw(str(tmp_path), 5, height=64, width=96)
    for item in ImageMasks().items(Tree.of(str(tmp_path)), ()):
        (found,) = ImageMasks().read(item)
        assert found.instances and found.segments and found.panoptic is not None and found.semantic is not None
        assert not any(i.iscrowd for i in found.instances)
        assert {i.category_id for i in found.instances} <= {drawn_shelves.PRODUCT, drawn_shelves.GAP}
        label_of = np.array([drawn_shelves.VOID, *(s.category_id for s in found.segments)])
        np.testing.assert_array_equal(label_of[found.panoptic], found.semantic)
