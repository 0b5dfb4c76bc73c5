"""LiTS's figures against the rule of its scoring program, by hand, and by properties."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lits_cases import DEFAULTS, LARGE, EndsProgramError, Scan, Voxels, official, random_scan
from scipy import ndimage

from segbatch import schemas
from segbatch.codecs import volume
from segbatch.datasets import tables
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import bootstrap, registry
from segbatch.metrics.arrays import Arrays
from segbatch.metrics.base import Detail, MetricOptions, Row
from segbatch.metrics.lits import LitsMetric
from segbatch.records import ClassInfo, ClassTable

CLASSES = tables.load("lits")
UNIT = (1.0, 1.0, 1.0)


def metric_of(upstream_bugs: bool = False) -> LitsMetric:
    return LitsMetric(CLASSES, MetricOptions(upstream_bugs=upstream_bugs))


def slices_of(scan: Scan, metric: LitsMetric | None = None) -> list[Arrays]:
    """State of every slice."""
    truth, predicted = scan.batches()
    return [(metric or metric_of()).update(Row(truth, k), Row(predicted, k)) for k in range(truth.num_rows)]


def figures_of(scans: Sequence[Scan], upstream_bugs: bool = False) -> dict[str, float | None]:
    metric = metric_of(upstream_bugs)
    total = metric.merge(s for scan in scans for s in slices_of(scan, metric))
    return {f.metric: f.value for f in metric.compute(total)}


def details_of(scan: Scan) -> list[Detail]:
    metric = metric_of()
    return list(metric.details(metric.merge(slices_of(scan))))


def random_scans(seed: int) -> list[Scan]:
    rng = np.random.default_rng(seed)
    numbers = rng.choice(30, rng.integers(1, 4), replace=False).tolist()
    return [random_scan(1000 * seed + n, f"volume-{n}") for n in numbers]


def line(truth: str, predicted: str, spacing: tuple[float, float, float] = UNIT, name: str = "volume-0") -> Scan:
    """A volume of one row and one slice, a digit a voxel."""
    one, other = (np.array([int(c) for c in text], np.uint8)[:, None, None] for text in (truth, predicted))
    return Scan(name, one, other, spacing)


def check(seed: int) -> bool:
    """Both ways against the official rule; whether its bugs made a difference or ended it."""
    scans = random_scans(seed)
    plain = figures_of(scans)
    assert plain == official(scans, upstream_bugs=False), seed
    try:
        expected = official(scans, upstream_bugs=True)
    except EndsProgramError:
        with pytest.raises(DataError, match="ends the official program") as caught:
            figures_of(scans, upstream_bugs=True)
        assert caught.value.code in ("no-lesion", "no-liver")
        return True
    assert figures_of(scans, upstream_bugs=True) == expected, seed
    return plain != expected


# -- against the rule --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_all_figures_are_those_of_the_official_rule() -> None:
    different = [check(seed) for seed in range(80)]
    assert 20 < sum(different) < 70


@pytest.mark.slow
def test_all_figures_are_those_of_the_official_rule_at_length() -> None:
    different = [check(seed) for seed in range(80, 2000)]
    assert 500 < sum(different) < 1900


@pytest.mark.long
def test_more_lesions_than_8_bits_hold() -> None:
    rng = np.random.default_rng(3)
    truth = np.full((14, 14, 12), 1, np.uint8)
    truth[::2, ::2, ::2] = 2
    truth[::4, 1, ::2] = 2  # some are joined
    predicted = truth.copy()
    noise = rng.random(truth.shape) < 0.05
    predicted[noise] = rng.integers(1, 3, int(noise.sum()))
    scans = [Scan("volume-0", truth, predicted, (0.5, 0.75, 2.0))]
    assert ndimage.label(truth == 2)[1] > 260
    found = figures_of(scans, upstream_bugs=True)
    assert found == official(scans, upstream_bugs=True)
    assert found["lesion_dice"] != figures_of(scans)["lesion_dice"]


def test_the_figures_are_complete_and_named_as_in_the_official_file() -> None:
    expected = official([random_scan(1)], upstream_bugs=False)
    assert len(expected) == 24
    assert set(figures_of([random_scan(1)])) == set(expected)
    nothing = metric_of().compute(metric_of().merge([]))
    assert [f.metric for f in nothing] == list(figures_of([random_scan(1)]))
    assert {f.value for f in nothing} == {None}


def test_a_perfect_prediction() -> None:
    truth = random_scan(2).truth
    assert (truth == 2).any() and (truth == 1).any()
    found = figures_of([Scan("volume-2", truth, truth, (0.7, 0.7, 5.0))])
    distances = {n: v for n, v in found.items() if n.endswith(("assd", "rmsd", "msd", "rvd", "voe"))}
    assert set(distances.values()) == {0.0} and len(distances) == 10
    assert found["tumor_burden_rmse"] == found["tumor_burden_max"] == 0.0
    others = set(found) - set(distances) - {"tumor_burden_rmse", "tumor_burden_max"}
    assert {found[n] for n in others} == {1.0}


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_merged_lesions_that_are_not_detected_make_true_positives_negative_only_with_the_bug() -> None:
    scan, lesions = line("1212121211", "2222222222"), 4
    plain, upstream = figures_of([scan]), figures_of([scan], upstream_bugs=True)
    assert plain["lesion_recall"] == plain["lesion_precision"] == 0.0
    assert upstream["lesion_recall"] == (1 - lesions) / lesions
    assert upstream["lesion_precision"] == 1 - lesions
    for found in (plain, upstream):
        assert found["lesion_precision_greater_zero"] == 1.0
        assert found["lesion_recall_greater_zero"] == 1 / lesions


def test_the_union_is_of_another_prediction_only_with_the_bug() -> None:
    """The first predicted lesion hits the second of two: the bug looks for what was matched with the first."""
    scan = line("2010200001", "0022222201")
    assert figures_of([scan])["lesion_recall"] == 0.0  # IoU 1 / 6
    assert figures_of([scan], upstream_bugs=True)["lesion_recall"] == 0.5  # "IoU" 1 / 1


def test_half_an_overlap_is_not_enough() -> None:
    assert figures_of([line("22221", "22111")])["lesion_recall"] == 0.0
    assert figures_of([line("22211", "22111")])["lesion_recall"] == 1.0


def test_a_case_without_reference_lesions_counts_its_false_positives() -> None:
    clean, wrong = line("0111110", "0111110", name="volume-1"), line("0111110", "0121210", name="volume-2")
    found = figures_of([clean, wrong])
    assert found["lesion_dice_per_case"] == 0.5
    assert found["lesion_precision"] == found["lesion_recall"] == 0.0
    assert found["lesion_dice_global"] == 0.0
    assert {n: found[f"lesion_{n}"] for n in DEFAULTS} == DEFAULTS
    assert found["tumor_burden_max"] == 0.0
    assert found["tumor_burden_rmse"] == math.sqrt(0.4**2 / 2)
    assert figures_of([clean])["lesion_dice_global"] is None
    with pytest.raises(DataError, match="volume-1 has no lesion"):
        figures_of([clean, wrong], upstream_bugs=True)


def test_a_case_without_predicted_liver_is_penalised() -> None:
    scan = line("0112110", "0002000")
    found = figures_of([scan])
    assert {n: found[f"liver_{n}"] for n in DEFAULTS} == DEFAULTS
    assert found["liver_dice_per_case"] == found["liver_dice_global"] == 0.0
    assert found["tumor_burden_max"] == 1 / 5 - LARGE
    assert found["lesion_dice"] == 1.0


def test_a_case_without_reference_liver_has_no_tumor_burden() -> None:
    empty = line("0000", "0110", name="volume-1")
    found = figures_of([empty])
    assert found["tumor_burden_rmse"] is None and found["tumor_burden_max"] is None
    assert found["liver_dice"] == 0.0 and found["liver_msd"] == LARGE
    whole = line("0112", "0111", name="volume-2")
    assert figures_of([empty, whole])["tumor_burden_rmse"] == 1 / 3


@pytest.mark.parametrize("axis", range(3))
def test_distances_follow_the_spacing_of_their_axis(axis: int) -> None:
    truth, predicted = np.zeros((5, 6, 7), np.uint8), np.zeros((5, 6, 7), np.uint8)
    truth[1, 1, 1] = 1
    predicted[tuple(4 if a == axis else 1 for a in range(3))] = 1
    spacing = (0.5, 0.75, 5.0)
    found = figures_of([Scan("volume-0", truth, predicted, spacing)])
    assert found["liver_assd"] == found["liver_msd"] == 3 * spacing[axis]
    assert found["liver_rmsd"] == pytest.approx(3 * spacing[axis], rel=1e-15)


def test_details_tell_cases_and_lesions() -> None:
    rows = details_of(line("0222101120022", "0222201111000", (2.0, 3.0, 4.0)))
    case, *lesions = rows
    assert (case.kind, case.group_id) == ("case", "volume-0")
    assert case.values["lesions_reference"] == 3 and case.values["lesions_predicted"] == 1
    assert case.values["lesions_found"] == case.values["lesions_detected"] == 1
    assert case.values["lesion_reference_mm3"] == 6 * 24.0
    assert case.values["tumor_burden_reference"] == 6 / 9
    assert case.values["tumor_burden_predicted"] == 4 / 8
    ids = [(r.kind, r.class_name, r.truth_id, r.predicted_id) for r in lesions]
    assert ids == [
        ("lesion", "lesion", 1, None),
        *(("lesion", "lesion", n, None) for n in (2, 3)),
        ("lesion", "lesion", None, 1),
    ]
    found, missed, other, predicted = (r.values for r in lesions)
    assert found["volume_mm3"] == 3 * 24.0 and predicted["volume_mm3"] == 4 * 24.0
    assert found["detected"] == predicted["detected"] == 1.0
    assert found["iou"] == 3 / 4 and found["dice"] == 6 / 7
    assert found["msd"] == 2.0 and found["match"] == predicted["match"] == 1.0
    assert {missed["iou"], missed["match"], missed["msd"], other["dice"]} == {None}
    assert missed["detected"] == 0.0


def test_details_of_undetected_matches_and_of_cases_without_liver() -> None:
    case, lesion, predicted = details_of(line("0022222200", "0000000222"))
    assert lesion.values["detected"] == predicted.values["detected"] == 0.0
    assert lesion.values["iou"] == 1 / 8 and lesion.values["msd"] == 5.0
    assert case.values["lesions_found"] == 1 and case.values["lesions_detected"] == 0
    assert details_of(line("0000", "0110"))[0].values["tumor_burden_difference"] is None


# -- states ------------------------------------------------------------------------------------------------------------


def test_a_whole_volume_folds_and_a_part_waits() -> None:
    metric, scan = metric_of(), random_scan(7)
    states = slices_of(scan)
    assert len(states) > 2
    assert metric.folded(states[1:]) is None
    whole = metric.folded(states[::-1])
    assert whole is not None
    assert metric.compute(whole) == metric.compute(metric.merge(states))
    assert not any(len(whole.values[n]) for n in ("slice", "truth", "predicted"))
    expected = official([scan], upstream_bugs=False)
    assert metric.image(whole).score == expected["lesion_dice_per_case"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_says_the_same(data: st.DataObject) -> None:
    metric = metric_of()
    scans = random_scans(data.draw(st.integers(0, 50)))
    states = [s for scan in scans for s in slices_of(scan)]
    whole = metric.merge(states)
    shuffled = data.draw(st.permutations(states))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(states)), max_size=4)))
    bounds = [0, *cuts, len(states)]
    parts = [metric.merge(shuffled[a:b]) for a, b in itertools.pairwise(bounds)]
    again = metric.merge(reversed([through_table(metric, p) for p in parts]))
    assert metric.compute(again) == metric.compute(whole)
    assert list(metric.details(again)) == list(metric.details(whole))


def through_table(metric: LitsMetric, state: Arrays) -> Arrays:
    """The state of several images written image by image, and read again."""
    from segbatch.metrics.lits import _images

    images = [metric.merge([s]) for s in _images(metric, state)]
    table = {"sample_id": [s.images[0] for s in images], "group_id": [s.groups[0] for s in images]}
    names = {name: pa.array(values, pa.string()) for name, values in table.items()}
    batch = pa.RecordBatch.from_pydict({**names, **metric.columns(images)})
    assert batch.column("arrays").type == schemas.STATE.field("arrays").type
    return metric.merge([s for s in metric.states(batch) if s is not None])


def test_images_are_scored_slice_by_slice() -> None:
    truth, predicted = np.zeros((2, 2, 2, 3), np.uint8)
    truth[..., 0], predicted[0, :, 0] = 2, 2
    truth[0, 0, 1] = predicted[0, 0, 1] = 1
    metric = metric_of()
    first, second, third = map(metric.image, slices_of(Scan("volume-0", truth, predicted, UNIT)))
    assert first.score == 2 / 3
    assert [(c.class_name, c.tp, c.fp, c.fn) for c in first.classes] == [("liver", 2, 0, 2), ("lesion", 2, 0, 2)]
    assert second.score is None and [(c.class_name, c.iou) for c in second.classes] == [("liver", 1.0)]
    assert third.score is None and third.classes == ()


def test_the_bootstrap_draws_volumes() -> None:
    metric = metric_of()
    scans = {s.name: s for s in (random_scan(n) for n in (3, 4, 7, 8))}
    units = {name: metric.merge(slices_of(s)) for name, s in scans.items()}
    key = ("lesion_dice_per_case", "")
    found = bootstrap.values(metric, units, 60, seed=0)[key]
    dices = [
        metric.compute(u)[[f.metric for f in metric.compute(u)].index(key[0])].value or 0.0 for u in units.values()
    ]
    assert min(dices) <= found.min() < found.max() <= max(dices)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_volume_with_missing_slices_is_named() -> None:
    metric, states = metric_of(), slices_of(random_scan(7, "volume-41"))
    total = metric.merge([*slices_of(random_scan(3)), *states[:1], *states[2:]])
    with pytest.raises(DataError, match=f"1 of the {len(states)} slices of volume volume-41 .* slice 1 ") as caught:
        metric.compute(total)
    assert caught.value.code == "missing-slice" and caught.value.fix
    with pytest.raises(DataError, match="volume-41"):
        list(metric.details(total))


def test_volumes_with_missing_slices_can_be_left_out() -> None:
    metric, whole, part = metric_of(), *(random_scan(n, f"volume-{n}") for n in (3, 4))
    states, some = slices_of(whole, metric), slices_of(part, metric)[1:]
    total = metric.merge([*states, *some])
    assert metric.compute(metric.complete(total)) == metric.compute(metric.merge(states))
    assert {f.value for f in metric.compute(metric.complete(metric.merge(some)))} == {None}


def test_slices_that_do_not_fit_are_refused() -> None:
    metric, scan = metric_of(), random_scan(7)
    states = slices_of(scan)
    with pytest.raises(DataError, match="slice 0 of volume volume-7 is there twice"):
        metric.folded([states[0], *states])
    other = Scan(scan.name, scan.truth, scan.predicted, (9.0, 9.0, 9.0))
    with pytest.raises(DataError, match="differ in size, spacing or number") as caught:
        metric.folded([*states[:-1], slices_of(other)[-1]])
    assert caught.value.code == "size-mismatch"
    with pytest.raises(DataError, match="differ in size"):
        metric.merge([*states[:-1], slices_of(other)[-1]])


def rows(**changed: Any) -> tuple[Row, Row]:
    """A slice and its prediction; ``changed`` replaces values of the one, or of the other as ``predicted_...``."""
    pair = []
    for batch, prefix in zip(line("0122", "0112").batches(), ("", "predicted_"), strict=True):
        row = batch.to_pylist()[0]
        row |= {n: changed[prefix + n] for n in row if prefix + n in changed}
        pair.append(Row(pa.RecordBatch.from_pylist([row], schema=batch.schema), 0))
    return pair[0], pair[1]


RUNS = [{"value": 0, "length": 1}, {"value": 3, "length": 3}]


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"predicted_width": 5}, "size-mismatch", "ground truth is 4 x 1 pixels, the prediction 5 x 1"),
        ({"semantic": RUNS[:1]}, "bad-runs", "the runs of the ground truth do not fill its 4 pixels"),
        ({"predicted_semantic": RUNS[:1]}, "bad-runs", "the runs of the prediction do not fill"),
        ({"predicted_semantic": RUNS}, "unknown-class", "the prediction has the label 3"),
        ({"volume": None}, "no-volume", "volume-0/0000 is no slice of a volume"),
        ({"group_id": None}, "no-volume", "volume-0/0000 is no slice of a volume"),
    ],
)
def test_a_slice_that_cannot_be_compared_says_why(changed: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        metric_of().update(*rows(**changed))
    assert caught.value.code == code and caught.value.fix


def test_runs_need_not_be_the_longest() -> None:
    pieces = [{"value": v, "length": n} for v, n in ((0, 1), (1, 0), (1, 1), (2, 1), (0, 0), (2, 1))]
    metric = metric_of()
    plain, pieced = (metric.merge([metric.update(*pair)]) for pair in (rows(), rows(semantic=pieces)))
    assert metric.compute(plain) == metric.compute(pieced)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 background, 1 liver and 2 lesion"):
        LitsMetric(ClassTable((ClassInfo(0, "road"), ClassInfo(1, "car"))))


def test_it_is_the_default_of_its_dataset_and_heeds_its_option() -> None:
    assert registry.default_protocol("lits") == "lits"
    made = registry.make("lits", CLASSES, MetricOptions(upstream_bugs=True))
    assert isinstance(made, LitsMetric)
    with pytest.raises(ConfigError, match="boundary"):
        registry.make("lits", CLASSES, MetricOptions(boundary=0.1))


# -- real data ---------------------------------------------------------------------------------------------------------


def real_labels(folder: Path) -> tuple[Voxels, tuple[float, float, float]]:
    """A real liver; what is darker than 10 HU in it, smoothed, stands for lesions."""
    found = []
    for name in ("liver.nii.gz", "example_ct_sm.nii.gz"):
        with (folder / name).open("rb") as stream:
            header = volume.read_header(stream)
            stream.seek(0)
            found.append(np.stack(list(volume.slices(stream, header))).transpose(2, 1, 0))
    liver, ct = found
    dark = ndimage.gaussian_filter(ct.astype(np.float64), 1) < 10
    return np.where((liver > 0) & dark, 2, liver > 0).astype(np.uint8), header.spacing_mm


@pytest.mark.long
def test_a_real_liver_against_itself_and_moved(shared_data: Callable[[str], Path]) -> None:
    truth, spacing = real_labels(shared_data("data/ct_liver"))
    itself = figures_of([Scan("volume-0", truth, truth, spacing)])
    assert itself["lesion_dice_per_case"] == itself["lesion_recall"] == itself["liver_dice"] == 1.0
    assert itself["liver_msd"] == itself["lesion_assd"] == 0.0
    moved = Scan("volume-0", truth, np.roll(truth, (2, 1, 0), (0, 1, 2)), spacing)
    for upstream_bugs in (False, True):
        assert figures_of([moved], upstream_bugs) == official([moved], upstream_bugs)
    assert figures_of([moved])["liver_msd"] == 3.0 * math.sqrt(5)
