"""TIDE against its rule, written down anew from the source of tidecv 1.0.1, and by properties."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from coco_cases import Case, instance_rows, random_case, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from segbatch.codecs import rle
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import registry
from segbatch.metrics.arrays import Arrays
from segbatch.metrics.base import CountsMissing, image_order
from segbatch.metrics.tide import ERRORS, KINDS, TideMetric
from segbatch.records import ClassInfo, ClassTable, Figure

Found = dict[str, float | None]

TYPES = (*ERRORS, "miss")
THINGS = ClassTable((ClassInfo(1, "cat"), ClassInfo(2, "dog"), ClassInfo(9, "none", ignore=True)))


# -- the rule --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """``TIDERun``: points are (class, score, right); errors (type, point, point once fixed)."""

    errors: list[tuple[str, Any, Any]] = field(default_factory=list)
    right: list[tuple[int, float, bool]] = field(default_factory=list)
    plain: list[tuple[int, float, bool]] = field(default_factory=list)
    objects: Counter[int] = field(default_factory=Counter)
    missed: Counter[int] = field(default_factory=Counter)
    lost: Counter[int] = field(default_factory=Counter)


def reference(case: Case, kind: str) -> tuple[Found, Counter[str]]:
    """AP and dAPs by name, and how many errors of each type there are."""
    run = Run()
    names = [str(i["id"]) for i in case.images]
    for place in image_order(names).tolist():
        number = case.images[place]["id"]
        truth = [a for a in case.annotations if a["image_id"] == number]
        found = [r for r in case.results if r["image_id"] == number]
        evaluate(run, kind, sorted(found, key=lambda r: -r["score"])[:100], truth)
    base = mean_ap(run.plain, run.objects)
    figures: Found = {"ap50": base}
    for error in TYPES:
        points = [after if name == error else before for name, before, after in run.errors]
        objects = run.objects - run.missed if error == "miss" else run.objects
        fixed = mean_ap([p for p in points if p is not None] + run.right, objects)
        figures[f"dap_{error}"] = None if fixed is None or base is None else max(fixed - base, 0)
    before = [p for _, p, _ in run.errors if p is not None]
    at_the_ends = [(c, 0.0, False) for c, _, _ in before] + [(c, 1.0, True) for c, _, _ in run.right]
    for name, fixed in (
        ("fp", mean_ap(at_the_ends, run.objects)),
        ("fn", mean_ap(before + run.right, run.objects - run.lost)),
    ):
        figures[f"dap_{name}"] = None if fixed is None or base is None else fixed - base
    counts = Counter(name for name, _, _ in run.errors)
    counts["miss"], counts["fn"], counts["fp"] = run.missed.total(), run.lost.total(), len(before)
    return figures, counts


def shape(entry: dict[str, Any], kind: str) -> Any:
    return entry["bbox"] if kind == "bbox" else entry["segmentation"]


def overlap(a: dict[str, Any], b: dict[str, Any], kind: str, crowd: bool = False) -> float:
    return float(coco_mask.iou([shape(a, kind)], [shape(b, kind)], [crowd])[0, 0])


def evaluate(run: Run, kind: str, found: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    """``TIDEExample`` and ``_eval_image`` for one image."""
    regions = [a for a in truth if a["iscrowd"]]
    objects = [a for a in truth if not a["iscrowd"]]
    run.objects.update(a["category_id"] for a in objects)
    ious = [[overlap(d, g, kind) for g in objects] for d in found]
    same = [[d["category_id"] == g["category_id"] for g in objects] for d in found]
    taken: dict[int, int] = {}  # object -> detection
    used: list[bool | None] = [False] * len(found)
    for i in range(len(found)):
        free = [ious[i][j] if same[i][j] and j not in taken else 0.0 for j in range(len(objects))]
        if free and max(free) >= 0.5:
            taken[free.index(max(free))] = i
            used[i] = True
    for region in regions:
        for i, d in enumerate(found):
            inside = d["category_id"] == region["category_id"] and overlap(d, region, kind, True) > 0.5
            used[i] = None if inside and not used[i] else used[i]
    corrected: dict[int, int] = {}  # object that is not taken -> first detection that would find it once fixed
    errors: list[tuple[str, int, int | None]] = []
    for i in range(len(found)):
        if not used[i]:
            name, target = error_of(ious[i], same[i], taken)
            if target is not None and target not in taken:
                corrected.setdefault(target, i)
            errors.append((name, i, target))
    points = [(d["category_id"], d["score"], bool(u)) for d, u in zip(found, used, strict=True)]
    run.plain += [p for p, u in zip(points, used, strict=True) if u is not None]
    run.right += [p for p, u in zip(points, used, strict=True) if u]
    for name, i, target in errors:
        before = points[i] if used[i] is False else None
        mended = target is not None and corrected.get(target) == i
        after = (objects[target]["category_id"], found[i]["score"], True) if mended and target is not None else None
        run.errors.append((name, before, after))
    for j, g in enumerate(objects):
        if j not in taken:
            run.lost[g["category_id"]] += 1
            run.missed[g["category_id"]] += j not in corrected


def error_of(ious: list[float], same: list[bool], taken: dict[int, int]) -> tuple[str, int | None]:
    """Type of the error, and the object that the detection should have been."""
    if not ious:
        return "bkg", None
    own = [iou * s for iou, s in zip(ious, same, strict=True)]
    other = [iou * (not s) for iou, s in zip(ious, same, strict=True)]
    used = [iou * (j in taken) for j, iou in enumerate(own)]
    if 0.1 <= max(own) <= 0.5:
        return "loc", own.index(max(own))
    if max(other) >= 0.5:
        return "cls", other.index(max(other))
    if max(used) >= 0.5:
        return "dupe", None
    return ("bkg" if max(ious) <= 0.1 else "both"), None


def mean_ap(points: list[tuple[int, float, bool]], objects: Counter[int]) -> float | None:
    """``get_mAP`` / 100; None where no class has points or objects."""
    classes = {c for c, _, _ in points} | {c for c, n in objects.items() if n}
    found = [ap([p for p in points if p[0] == c], objects[c]) for c in sorted(classes)]
    return sum(found) / len(found) if found else None


def ap(points: list[tuple[int, float, bool]], objects: int) -> float:
    """``get_ap`` / 100."""
    if not objects:
        return 0.0
    precisions, recalls, right = [], [], 0
    for number, (_, _, is_right) in enumerate(sorted(points, key=lambda p: -p[1]), 1):
        right += is_right
        precisions.append(right / number)
        recalls.append(right / objects)
    total = 0.0
    for percent in range(101):
        after = [p for p, r in zip(precisions, recalls, strict=True) if r >= percent / 100]
        total += max(after, default=0.0)
    return total / 101


# -- cases -----------------------------------------------------------------------------------------------------------


def tide_case(seed: int) -> Case:
    """A random case; in every second one detections lie near the objects, some of them under other classes."""
    case, rng = random_case(seed), np.random.default_rng(seed)
    if seed % 2:
        for a in case.annotations:
            mask = coco_mask.decode(a["segmentation"])
            for _ in range(rng.integers(0, 3)):
                moved = np.roll(mask, rng.integers(-6, 7, 2).tolist(), (0, 1))
                label = a["category_id"] if rng.random() < 0.6 else int(rng.choice(case.labels))
                runs = coco_mask.encode(np.asfortranarray(moved))
                entry = {"image_id": a["image_id"], "category_id": label, "area": float(moved.sum())}
                entry["segmentation"] = {"size": list(mask.shape), "counts": runs["counts"].decode()}
                entry["bbox"] = coco_mask.toBbox(runs).tolist()
                case.results.append({**entry, "score": float(rng.integers(0, 6)) / 5})
    return case


def states_of(case: Case) -> tuple[TideMetric, list[Arrays]]:
    metric = TideMetric(case.classes)
    return metric, [metric.update(*pair) for pair in instance_rows(case)]


def figures_of(case: Case) -> list[Figure]:
    metric, states = states_of(case)
    return metric.compute(metric.merge(states))


def check_case(seed: int) -> Counter[str]:
    """Compare all figures; how many errors of each type there were."""
    case = tide_case(seed)
    found = {f.metric: f for f in figures_of(case) if not f.class_name}
    counts: Counter[str] = Counter()
    for kind in KINDS:
        expected, errors = reference(case, kind)
        for name, value in expected.items():
            assert found[f"{kind}_{name}"].value == pytest.approx(value, abs=1e-12), (seed, kind, name)
        for name in (*TYPES, "fp", "fn"):
            assert found[f"{kind}_dap_{name}"].support == errors[name], (seed, kind, name)
        counts.update(errors)
    return counts


def test_all_figures_are_those_of_the_rule() -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        if seed % 10 != 7:  # those have more than 100 detections, which takes its time
            counts += check_case(seed)
    assert min(counts[name] for name in TYPES) > 20


def test_only_the_best_hundred_of_an_image_count() -> None:
    case = tide_case(7)
    assert max(Counter(r["image_id"] for r in case.results).values()) > 100
    check_case(7)
    _, states = states_of(case)
    assert max(len(s.values["scores"]) for s in states) == 100


@pytest.mark.slow
def test_all_figures_are_those_of_the_rule_in_many_cases() -> None:
    for seed in range(60, 1000):
        check_case(seed)


# -- properties and single rules -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    metric, states = states_of(tide_case(data.draw(st.integers(0, 300))))
    order = data.draw(st.permutations(states))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    whole = metric.compute(metric.merge(states))
    assert metric.compute(metric.merge([metric.merge(piece) for piece in pieces])) == whole
    names = ["-", *(s.images[0] for s in order)]
    kept = {"sample_id": names, "group_id": names, **metric.columns([None, *order])}
    read = metric.states(pa.RecordBatch.from_pydict(kept).slice(1))
    assert metric.compute(metric.merge(s for s in read if s is not None)) == whole


def thing(left: int, width: int, category: int = 1, number: int = 1, **more: Any) -> dict[str, Any]:
    """A bar in an image of 1 x 40 pixels."""
    mask = np.zeros((1, 40), np.uint8)
    mask[0, left : left + width] = 1
    box = [float(left), 0.0, float(width), 1.0]
    known = {"id": number, "category_id": category, "bbox_xywh": box, "area": float(width), "iscrowd": False}
    return {**known, "counts": rle.encode(mask), **more}


def pair(objects: list[dict[str, Any]], found: list[dict[str, Any]], name: str = "1", width: int = 40) -> Any:
    same = {"sample_id": name, "height": 1, "width": 40}
    other = {"sample_id": name, "height": 1, "width": width}
    return row_of("samples", same | {"instances": objects}), row_of("masks", other | {"instances": found})


def supports(metric: TideMetric, state: Arrays) -> dict[str, int]:
    found = {
        f.metric.removeprefix("segm_dap_"): f.support or 0 for f in metric.compute(state) if "segm_dap" in f.metric
    }
    return {name: n for name, n in found.items() if n}


@pytest.mark.parametrize(
    ("found", "errors"),
    [
        ([thing(0, 10, score=0.9)], {}),
        ([thing(0, 10, 2, score=0.9)], {"cls": 1, "fp": 1, "fn": 1}),
        ([thing(0, 5, 1, score=0.9)], {}),  # an IoU of .5 is enough
        ([thing(0, 4, 1, score=0.9)], {"loc": 1, "fp": 1, "fn": 1}),
        ([thing(0, 1, 1, score=0.9)], {"loc": 1, "fp": 1, "fn": 1}),  # .1 is not yet background
        ([thing(9, 10, 1, score=0.9)], {"bkg": 1, "miss": 1, "fp": 1, "fn": 1}),
        ([thing(0, 4, 2, score=0.9)], {"both": 1, "miss": 1, "fp": 1, "fn": 1}),
        ([thing(30, 5, 2, score=0.9)], {"bkg": 1, "miss": 1, "fp": 1, "fn": 1}),
        ([thing(0, 10, score=0.9), thing(0, 9, 1, 2, score=0.8)], {"dupe": 1, "fp": 1}),
        ([thing(0, 5, score=0.9), thing(0, 5, 1, 2, score=0.8)], {"loc": 1, "fp": 1}),  # .5 again: TIDE says Loc
        ([], {"miss": 1, "fn": 1}),
    ],
)
def test_errors_are_told_apart(found: list[dict[str, Any]], errors: dict[str, int]) -> None:
    metric = TideMetric(THINGS)
    assert supports(metric, metric.update(*pair([thing(0, 10)], found))) == errors


def test_detections_on_crowds_are_ignored_yet_may_be_fixed() -> None:
    metric = TideMetric(THINGS)
    crowd = thing(20, 20, 1, 2, iscrowd=True)
    inside = metric.update(*pair([thing(0, 10), crowd], [thing(25, 5, score=0.9)]))
    assert supports(metric, inside) == {"bkg": 1, "miss": 1, "fn": 1}  # an error, but not a false positive
    other = metric.update(*pair([thing(0, 10), crowd], [thing(25, 5, 2, score=0.9)]))
    assert supports(metric, other)["fp"] == 1
    beside = thing(15, 10, 1, 3)
    near = metric.update(*pair([beside, crowd], [thing(20, 10, score=0.9)]))
    figures = {f.metric: f.value for f in metric.compute(near) if not f.class_name}
    assert (figures["segm_ap50"], figures["segm_dap_loc"], figures["segm_dap_miss"]) == (0.0, 1.0, 0.0)


def test_an_error_costs_what_it_takes_from_the_ap() -> None:
    metric = TideMetric(THINGS)
    objects = [thing(0, 10), thing(20, 10, 1, 2)]
    state = metric.update(*pair(objects, [thing(35, 5, 1, 1, score=0.9), thing(0, 10, 1, 2, score=0.8)]))
    figures = {f.metric: f.value for f in metric.compute(state) if not f.class_name}
    assert figures["segm_ap50"] == pytest.approx(51 * 0.5 / 101)
    assert figures["segm_dap_bkg"] == pytest.approx(51 * 0.5 / 101)
    assert figures["segm_dap_miss"] == pytest.approx(0.5 - 51 * 0.5 / 101)
    assert figures["segm_dap_fp"] == figures["segm_dap_bkg"]
    assert figures["segm_dap_fn"] == figures["segm_dap_miss"]
    assert figures["segm_dap_cls"] == figures["segm_dap_loc"] == 0.0


def test_classes_without_objects_count_where_something_was_found() -> None:
    metric = TideMetric(THINGS)
    state = metric.update(*pair([thing(0, 10)], [thing(0, 10, score=0.9), thing(30, 5, 2, 2, score=0.1)]))
    figures = {(f.metric, f.class_name): f.value for f in metric.compute(state)}
    assert (figures["segm_ap50", "cat"], figures["segm_ap50", "dog"], figures["segm_ap50", ""]) == (1.0, 0.0, 0.5)
    assert figures["segm_dap_bkg", ""] == 0.5
    alone = metric.update(*pair([thing(0, 10)], [thing(0, 10, score=0.9)]))
    assert {f.class_name: f.value for f in metric.compute(alone) if f.metric == "segm_ap50"}["dog"] is None


def test_where_nothing_is_left_there_is_no_value() -> None:
    metric = TideMetric(THINGS)
    state = metric.update(*pair([], [thing(30, 5, score=0.1)]))
    figures = {f.metric: f.value for f in metric.compute(state) if not f.class_name}
    assert (figures["segm_ap50"], figures["segm_dap_bkg"], figures["segm_dap_cls"]) == (0.0, None, 0.0)


def test_an_image_has_counts_and_its_own_ap() -> None:
    metric = TideMetric(THINGS)
    found = [
        thing(0, 10, score=0.9),
        thing(0, 10, 2, 2, score=0.8),
        thing(21, 9, 1, 3, score=0.7),  # on the crowd
        thing(0, 10, 9, 4, score=0.6),  # of an ignored class
    ]
    objects = [thing(0, 10), thing(12, 5, 1, 2), thing(20, 10, 1, 3, iscrowd=True), thing(0, 4, 9, 4)]
    image = metric.image(metric.update(*pair(objects, found)))
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in image.classes] == [("cat", 1, 0, 1), ("dog", 0, 1, 0)]
    assert image.score == pytest.approx(51 / 101 / 2)
    nothing = metric.image(metric.update(*pair([], [])))
    assert (nothing.score, nothing.classes) == (None, ())


def test_a_missing_image_counts_as_one_without_detections() -> None:
    metric = TideMetric(THINGS)
    assert isinstance(metric, CountsMissing)
    truth, nothing = pair([thing(0, 10), thing(20, 5, 2, 2)], [])
    assert metric.compute(metric.merge([metric.empty(truth)])) == metric.compute(metric.update(truth, nothing))


def test_equal_scores_are_decided_by_the_ids_as_numbers() -> None:
    metric = TideMetric(THINGS)
    right = metric.update(*pair([thing(0, 10)], [thing(0, 10, score=0.5)], "9"))
    wrong = metric.update(*pair([thing(0, 10)], [thing(30, 5, score=0.5)], "10"))
    for states in ([right, wrong], [wrong, right]):
        figures = {f.metric: f.value for f in metric.compute(metric.merge(states)) if not f.class_name}
        assert figures["segm_ap50"] == pytest.approx(51 / 101)
        assert figures["segm_dap_fn"] is not None
        assert figures["segm_dap_fn"] < 0  # once fixed, TIDE has wrong ones before right ones of the same score


def test_what_cannot_be_is_refused_by_name() -> None:
    metric = TideMetric(THINGS)
    with pytest.raises(ConfigError, match="tide needs classes, the samples name none"):
        TideMetric(ClassTable(()))
    cases: dict[str, tuple[Any, str]] = {
        "size-mismatch": (pair([], [], width=41), "ground truth is 40 x 1 pixels, the prediction 41 x 1"),
        "bad-score": (pair([], [thing(0, 1, score=2.0)]), "the score 2.0"),
        "duplicate-id": (pair([], [thing(0, 1, score=0.1)] * 2), "2 detections of id 1"),
        "unknown-class": (pair([], [thing(0, 1, 5, score=0.1)]), "class 5"),
        "bad-mask": (pair([thing(0, 1, counts=b"3")], []), "the mask of object 1: COCO counts cover 3 pixels"),
    }
    for code, (rows, words) in cases.items():
        with pytest.raises(DataError, match=words) as caught:
            metric.update(*rows)
        assert caught.value.code == code


def test_state_is_as_small_as_it_says() -> None:
    metric, states = states_of(tide_case(3))
    values = metric.merge(states).values
    assert values["scores"][0].nbytes + values["detections"][0].nbytes == 32
    assert values["objects"][0].nbytes == 24


def test_it_is_registered() -> None:
    assert isinstance(registry.make("tide", THINGS), TideMetric)
