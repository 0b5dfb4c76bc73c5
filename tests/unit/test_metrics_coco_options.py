"""What a caller may set of ``coco-instance``, and what it says of single objects, against pycocotools run live."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from coco_cases import Case, defined_mean, instance_rows, official, random_case
from pycocotools.cocoeval import COCOeval

from segbatch.errors import ConfigError
from segbatch.metrics import registry
from segbatch.metrics.base import Match, MetricOptions
from segbatch.metrics.coco_instance import CocoBoundaryMetric, CocoInstanceMetric
from segbatch.records import ClassInfo, ClassTable

CAT = ClassTable((ClassInfo(1, "cat"),))
SIZES = ("small", "medium", "large")


class Configured(COCOeval):  # type: ignore[misc]
    """pycocotools with other parameters; its summary wants three numbers of detections, so there is none."""

    options = MetricOptions()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.options.ious:
            self.params.iouThrs = np.array(self.options.ious)
        if self.options.max_detections:
            self.params.maxDets = list(self.options.max_detections)

    def summarize(self) -> None:
        """Nothing."""


def configured(options: MetricOptions) -> type[Configured]:
    return type("With", (Configured,), {"options": options})


def random_options(seed: int) -> MetricOptions:
    rng = np.random.default_rng(seed)
    choice = (0.05, 0.1, 0.25, 1 / 3, 0.5, 0.55, 0.6, 0.75, 0.8, 0.9, 1.0)
    ious = sorted(rng.choice(choice, rng.integers(0, 7), replace=False).tolist())
    most = sorted(rng.choice([1, 2, 3, 5, 17, 100, 120, 300], rng.integers(0, 5), replace=False).tolist())
    return MetricOptions(tuple(ious), tuple(most))


def wanted(case: Case, options: MetricOptions) -> dict[tuple[str, str], float | None]:
    """(metric, class) -> value from pycocotools' arrays: all figures but those of proposals."""
    found: dict[tuple[str, str], float | None] = {}
    for kind in ("segm", "bbox"):
        run = official(case, kind, evaluator=configured(options))
        precision, recall, p = run.eval["precision"], run.eval["recall"], run.params
        for k, name in ((slice(None), ""), *((k, f"class{label}") for k, label in enumerate(case.labels))):
            found[f"{kind}_ap", name] = defined_mean(precision[:, :, k, 0, -1])
            for metric, threshold in (("ap50", 0.5), ("ap75", 0.75)):
                for t in np.flatnonzero(p.iouThrs == threshold):
                    found[f"{kind}_{metric}", name] = defined_mean(precision[t, :, k, 0, -1])
            for a, size in enumerate(SIZES, 1):
                found[f"{kind}_ap_{size}", name] = defined_mean(precision[:, :, k, a, -1])
                found[f"{kind}_ar_{size}", name] = defined_mean(recall[:, k, a, -1])
            for m, most in enumerate(p.maxDets):
                found[f"{kind}_ar_{most}", name] = defined_mean(recall[:, k, 0, m])
        recall = official(case, kind, by_class=False, evaluator=configured(options)).eval["recall"]
        found[f"{kind}_proposal_ar_1000", ""] = defined_mean(recall[:, 0, 0, 2])
    return found


def check_options(seed: int) -> None:
    case, options = random_case(seed), random_options(seed)
    metric = CocoInstanceMetric(case.classes, options)
    figures = metric.compute(metric.merge(metric.update(*pair) for pair in instance_rows(case)))
    found = {(f.metric, f.class_name): f.value for f in figures}
    proposals = {key for key in found if "proposal" in key[0]}
    expected = wanted(case, options)
    assert {key: found[key] for key in expected} == expected, (seed, options)
    assert set(found) - proposals == set(expected) - proposals, (seed, options)


@pytest.mark.long
def test_figures_under_options_are_those_of_pycocotools() -> None:
    for seed in range(40):
        check_options(seed)


@pytest.mark.slow
def test_figures_under_options_are_those_of_pycocotools_in_many_cases() -> None:
    for seed in range(40, 1500):
        check_options(seed)


def test_no_option_is_the_official_protocol() -> None:
    case = random_case(3)
    figures = []
    for options in (
        MetricOptions(),
        MetricOptions(ious=tuple(np.linspace(0.5, 0.95, 10)), max_detections=(1, 10, 100)),
    ):
        metric = registry.make("coco-instance", case.classes, options)
        figures.append(metric.compute(metric.merge([metric.update(*pair) for pair in instance_rows(case)])))
    assert figures[0] == figures[1]


def test_only_the_very_iou_has_its_name() -> None:
    metric = CocoInstanceMetric(CAT, MetricOptions(ious=(0.501, 0.75)))
    names = {f.metric for f in metric.compute(metric.merge([]))}
    assert "segm_ap75" in names
    assert "segm_ap50" not in names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MetricOptions(ious=tuple(np.linspace(0.1, 0.9, 17))), "17 IoUs for 4 ranges of size.*give 16 IoUs at most"),
        (MetricOptions(ious=(0.5, 0.5)), r"IoUs are 0\.5, 0\.5 .give them in ascending order"),
        (MetricOptions(ious=(0.0, 0.5)), r"IoUs are 0\.0, 0\.5 .*above 0"),
        (MetricOptions(ious=(0.5, 1.01)), r"IoUs are 0\.5, 1\.01 .*at most 1"),
        (MetricOptions(ious=(0.5, float("nan"))), "IoUs are 0.5, nan"),
        (MetricOptions(max_detections=(0, 10)), "numbers of detections are 0, 10 .give them .* from 1 on"),
        (MetricOptions(max_detections=(100, 10)), "numbers of detections are 100, 10"),
        (MetricOptions(boundary=0.1), "coco-instance does not heed boundary"),
    ],
)
def test_options_out_of_range_are_refused(options: MetricOptions, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.make("coco-instance", CAT, options)


def test_as_many_ious_as_a_state_holds() -> None:
    metric = CocoInstanceMetric(CAT, MetricOptions(ious=tuple(np.linspace(0.1, 0.9, 16))))
    assert metric.compute(metric.merge([]))


# -- matches ---------------------------------------------------------------------------------------------------------


def official_matches(case: Case, options: MetricOptions) -> dict[int, Counter[Any]]:
    """By image, what pycocotools found at the least IoU for all sizes: (class, object, detection, IoU, outcome)."""
    run = official(case, "segm", evaluator=configured(options))
    found: dict[int, Counter[Any]] = {image["id"]: Counter() for image in case.images}
    for entry in run.evalImgs:
        if entry is None or entry["aRng"] != run.params.areaRng[0]:
            continue
        label, image = entry["category_id"], entry["image_id"]
        ious, order = run.ious[image, label], [g["id"] for g in run._gts[image, label]]
        seen = set()
        matches = zip(entry["dtIds"], entry["dtMatches"][0].tolist(), entry["dtIgnore"][0], strict=True)
        for row, (detection, partner, ignored) in enumerate(matches):
            outcome = "ignored" if ignored else "tp" if partner else "fp"
            iou = ious[row, order.index(int(partner))] if partner else None
            seen.add(int(partner))
            found[image][label, int(partner) or None, detection, iou, outcome] += 1
        for number, ignored in zip(entry["gtIds"], entry["gtIgnore"], strict=True):
            if number not in seen:
                found[image][label, number, None, None, "ignored" if ignored else "fn"] += 1
    return found


def kept(match: Match) -> tuple[Any, ...]:
    assert match.class_name == f"class{match.label_id}"
    assert (match.score is None) == (match.predicted_id is None)
    return match.label_id, match.truth_id, match.predicted_id, match.iou, match.outcome


def read_again(metric: Any, states: list[Any]) -> list[Any]:
    names = [s.images[0] for s in states]
    batch = pa.RecordBatch.from_pydict({"sample_id": names, "group_id": names, **metric.columns(states)})
    found: list[Any] = metric.states(batch)
    return found


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_matches_are_those_of_pycocotools(start: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(start, start + 20):
        case, options = random_case(seed), random_options(seed)
        metric = CocoInstanceMetric(case.classes, options)
        states = [metric.update(*pair) for pair in instance_rows(case)]
        expected = official_matches(case, options)
        scores = {n: r["score"] for n, r in enumerate(case.results, 1)}
        for state, again in zip(states, read_again(metric, states), strict=True):
            image = metric.image(state)
            assert metric.image(again) == image
            assert image.matches is not None
            assert Counter(map(kept, image.matches)) == expected[int(state.images[0])], seed
            assert all(m.predicted_id is None or m.score == scores[m.predicted_id] for m in image.matches)
            counts = Counter((m.class_name, m.outcome) for m in image.matches)
            told = {c.class_name: (c.tp, c.fp, c.fn) for c in image.classes}
            there = {m.class_name for m in image.matches if m.outcome != "ignored"}
            assert {name: tuple(counts[name, o] for o in ("tp", "fp", "fn")) for name in there} == told
            outcomes.update(m.outcome for m in image.matches)
    assert min(outcomes[o] for o in ("tp", "fp", "fn", "ignored")) > 5


def test_merged_states_and_old_ones_have_no_matches() -> None:
    case = random_case(3)
    metric = CocoInstanceMetric(case.classes)
    states = [metric.update(*pair) for pair in instance_rows(case)]
    assert metric.merge(states).partners is None
    names, columns = [s.images[0] for s in states], dict(metric.columns(states))
    columns["arrays"] = pa.nulls(len(states), columns["arrays"].type)
    old = metric.states(pa.RecordBatch.from_pydict({"sample_id": names, "group_id": names, **columns}))
    assert [metric.image(s).matches for s in old if s is not None] == [None] * len(states)
    assert metric.compute(metric.merge(s for s in old if s is not None)) == metric.compute(metric.merge(states))


def test_the_words_of_every_kind_have_a_column() -> None:
    assert CocoInstanceMetric.state_columns[1:3] == ("matches_segm", "matches_bbox")
    assert CocoBoundaryMetric.state_columns[1:2] == ("matches_segm",)
