"""LiTS's figures for liver and lesions in CT volumes.

Source: github.com/PatrickChrist/lits-challenge-scoring, commit 090307d, ``program/evaluate.py``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import columns as run_columns
from segbatch.codecs import runlength
from segbatch.errors import ConfigError, DataError
from segbatch.metrics import lits_volume
from segbatch.metrics.arrays import ArrayMetric, Arrays, Field
from segbatch.metrics.base import DEFAULTS, ClassCount, Confusion, Detail, ImageScore, MetricOptions, Row, same_size
from segbatch.metrics.lits_volume import (
    CASE,
    LARGE,
    LESION,
    LESION_OF_CASE,
    LIVER,
    OBJECT,
    Box,
    Floats,
    Numbers,
    Volume,
)
from segbatch.records import ClassTable, Figure

_IDS = (0, LIVER, LESION)
_SLICE = ("index", "slices", "height", "width")
_SCORES = ("dice", "jaccard", "voe", "rvd", "assd", "rmsd", "msd")
_FREE = ("rvd", "assd", "rmsd", "msd")
"""Scores that may lie outside 0..1."""

_NOTHING = {"dice": 0.0, "jaccard": 0.0, "voe": 1.0} | dict.fromkeys(_FREE, LARGE)
"""Scores of what is not there."""


class LitsMetric(ArrayMetric):
    """Protocol ``lits``: the figures of LiTS's scoring program, all bits of its float64 (it prints 3 decimals).

    ``lesion_precision``, ``lesion_recall`` (IoU > .5), ``lesion_precision_greater_zero``,
    ``lesion_recall_greater_zero``; over the detected lesions (IoU > .5) the means ``lesion_dice``, ``lesion_jaccard``,
    ``lesion_voe``, ``lesion_rvd``, ``lesion_assd``, ``lesion_rmsd``, ``lesion_msd``; over the cases
    ``lesion_dice_per_case``, and the same of the liver as ``liver_...``; over all voxels ``lesion_dice_global``,
    ``liver_dice_global``; ``tumor_burden_rmse`` and ``tumor_burden_max``, which its file calls RMSE_Tumorburden and
    MAXERROR_Tumorburden. By its rules:

    - Lesions are 6-connected. Before they are compared, reference lesions that one predicted lesion covers best are
      merged, then predicted lesions that one of those covers best. True positives are counted after merging, the other
      lesions before.
    - The liver is whatever is labelled 1 or 2, in one piece or several. Where nothing is predicted 1, the case counts
      with Dice 0, also where 2 is predicted.
    - RVD is (reference - prediction) / prediction and has a sign, and so has the greatest error of the tumor burden:
      the greatest (reference - prediction), not the farthest from 0. 9001 stands for what is undefined, and enters
      the means.
    - A case without any lesion in reference and prediction has the lesion Dice 1.
    - Distances (mm) are taken between the centres of surface voxels, with the spacing of the file.
    - Cases are summed in the order of the names ``<volume>.nii``, their lesions in the order of their first voxels.

    Its defects are reproduced only with the option ``upstream_bugs``: the union of an IoU is taken of the wrong
    predicted lesion; a match that fails is subtracted once for each reference lesion merged in it, so that true
    positives may be fewer than 0 (precision and recall too); labels of detected lesions are kept in 8 bits; and a case
    whose reference has no lesion, or no liver, ends the program: here it is an error of that volume. Without the option
    the union is the match's own, every match counts once, a case without reference lesions counts its false positives,
    and one without reference liver has no tumor burden. Where the defects change nothing, both give the same figures.

    Not as there: a data set without any lesion has no ``lesion_dice_global`` (there a division by zero), more than
    32,767 lesions in a volume are counted (there an error), and labels but 0, 1 and 2 are refused.

    State: of a slice its runs, 16 bytes each; once all slices of a volume are together 150 bytes a volume, 64 bytes per
    match and 32 per lesion. To score 512 x 512 x 600 voxels with 460,000 runs and 1.2 million surface voxels takes
    110 MB.
    """

    name: ClassVar[str] = "lits"
    source: ClassVar[str] = "PatrickChrist/lits-challenge-scoring 090307d, 3 decimals; its defects with upstream_bugs"
    headline: ClassVar[str] = "lesion_dice_per_case"
    task_column: ClassVar[str] = "semantic"
    truth_columns: ClassVar[tuple[str, ...]] = ("semantic", "volume")
    prediction_columns: ClassVar[tuple[str, ...]] = ("semantic",)
    accepts: ClassVar[frozenset[str]] = frozenset({"upstream_bugs"})
    unbounded: ClassVar[frozenset[str]] = frozenset(
        {*(f"{what}_{name}" for what in ("lesion", "liver") for name in _FREE), "tumor_burden_rmse", "tumor_burden_max"}
    )
    fields: ClassVar[Mapping[str, Field]] = {
        # of a slice
        "slice": Field(len(_SLICE)),
        "truth": Field(2),
        "predicted": Field(2),
        # of a slice and of a case
        "spacing_mm": Field(3, real=True),
        "pixels": Field(3, merge="drop"),
        # of a case
        "case": Field(len(CASE)),
        "distances": Field(3, real=True),
        "objects": Field(len(OBJECT)),
        "object_distances": Field(3, real=True),
        "lesions": Field(len(LESION_OF_CASE)),
    }

    def __init__(self, classes: ClassTable, options: MetricOptions = DEFAULTS) -> None:
        """
        Raises:
            ConfigError: the classes are not LiTS's.
        """
        found = sorted(c.label_id for c in classes.scored)
        if tuple(found) != _IDS:
            problem = (
                f"protocol {self.name} scores the labels 0 background, 1 liver and 2 lesion, the samples have {found}"
            )
            raise ConfigError(problem, "choose another protocol; see `segbatch metrics`")
        self._names = {c.label_id: c.name for c in classes.scored}
        self._upstream_bugs = options.upstream_bugs

    # -- one slice -----------------------------------------------------------------------------------------------------

    def update(self, truth: Row, predicted: Row) -> Arrays:
        """Keep the runs of one slice.

        Raises:
            DataError: ``size-mismatch``, ``bad-runs``, ``unknown-class``, ``no-volume`` (an image, not a slice).
        """
        height, width = same_size(truth, predicted)
        at = truth.column("volume")[truth.index].as_py() or {}
        group = truth.text("group_id")
        if group is None or any(at.get(name) is None for name in ("index", "slices", "spacing_mm")):
            problem = f"sample {truth.text('sample_id')} is no slice of a volume"
            raise DataError(problem, f"protocol {self.name} scores CT volumes: ingest them as such", "no-volume")
        runs = [self._runs(row, truth, height * width) for row in (truth, predicted)]
        values = {
            "slice": np.array([at["index"], at["slices"], height, width]),
            "spacing_mm": np.array(at["spacing_mm"]),
            **{name: np.stack(r, 1) for name, r in zip(("truth", "predicted"), runs, strict=True)},
            "pixels": _pixels(*runs),
        }
        return self._state(truth.text("sample_id") or "", group, values)

    def _runs(self, row: Row, truth: Row, area: int) -> runlength.Runs:
        what = "ground truth" if row is truth else "prediction"
        name, runs = truth.text("sample_id"), run_columns.runs_at(row.column("semantic"), row.index)
        if runs is None or int(runs.lengths.sum(dtype=np.uint64)) != area:
            problem = f"sample {name}: the runs of the {what} do not fill its {area} pixels"
            raise DataError(problem, "write that table again", "bad-runs")
        greatest = int(runs.values[runs.lengths > 0].max(initial=0))
        if greatest > LESION:
            problem = f"sample {name}: the {what} has the label {greatest}"
            raise DataError(problem, "LiTS has 0 (background), 1 (liver) and 2 (lesion)", "unknown-class")
        return runs

    def _state(self, sample_id: str, group: str, values: Mapping[str, NDArray[Any]]) -> Arrays:
        empty = {name: f.empty() for name, f in self.fields.items()}
        return self.state(sample_id, group, empty | dict(values))

    def image(self, state: Arrays) -> ImageScore:
        """Dice of the lesions of a slice, None where there is none; of a whole volume, as it counts per case."""
        lesion, liver = state.values["pixels"].reshape(2, 3).tolist()
        rows = ((LIVER, liver), (LESION, lesion))
        classes = tuple(ClassCount(self._names[i], i, *counts) for i, counts in rows if any(counts))
        whole = 2 * lesion[0] + lesion[1] + lesion[2]
        none = 1.0 if len(state.values["case"]) else None
        return ImageScore(2 * lesion[0] / whole if whole else none, classes)

    # -- volumes -------------------------------------------------------------------------------------------------------

    def folded(self, states: Sequence[Arrays]) -> Arrays | None:
        """The case, once all slices of a volume are there.

        Raises:
            DataError: ``duplicate-id`` (a slice is there twice), ``size-mismatch`` (slices that do not fit), and with
                ``upstream_bugs`` ``no-lesion`` and ``no-liver`` (the reference has none).
        """
        group, rows = states[0].groups[0], np.concatenate([s.values["slice"] for s in states])
        spacings = np.concatenate([s.values["spacing_mm"] for s in states])
        strange = (rows[:, 1:] != rows[0, 1:]).any() or (spacings != spacings[0]).any()
        if strange or (rows[:, 0] < 0).any() or (rows[:, 0] >= rows[0, 1]).any():
            problem = f"the slices of volume {group} differ in size, spacing or number"
            raise DataError(problem, "ingest the volume again", "size-mismatch")
        indices, times = np.unique(rows[:, 0], return_counts=True)
        if (times > 1).any():
            problem = f"slice {indices[times > 1][0]} of volume {group} is there twice"
            raise DataError(problem, "give each volume a name of its own", "duplicate-id")
        if len(indices) < rows[0, 1]:
            return None
        ordered = [states[i] for i in np.argsort(rows[:, 0])]
        runs = [np.concatenate([s.values[name] for s in ordered]) for name in ("truth", "predicted")]
        _, slices, height, width = rows[0].tolist()
        values = lits_volume.score(Volume(Box(width, height, slices), spacings[0], *runs), self._upstream_bugs)
        case = dict(zip(CASE, values["case"][0].tolist(), strict=True))
        self._check(group, case)
        pixels = [
            _errors(case[f"{what}_truth"], case[f"{what}_predicted"], case[f"{what}_shared"])
            for what in ("lesion", "liver")
        ]
        known = {**values, "spacing_mm": spacings[0], "pixels": np.array(pixels, np.int64)}
        return self._state(ordered[-1].images[0], group, known)

    def _check(self, group: str, case: Mapping[str, int]) -> None:
        for what in ("lesion", "liver") if self._upstream_bugs else ():
            if not case[f"{what}_truth"]:
                problem = f"the reference of volume {group} has no {what}, which ends the official program"
                raise DataError(problem, "leave upstream_bugs away", f"no-{what}")

    def merge(self, states: Iterable[Arrays]) -> Arrays:
        """One after the other; volumes that are complete now become cases.

        Raises:
            DataError: as ``folded``.
        """
        whole = super().merge(states)
        waiting = _waiting(whole)
        complete = [places for places in waiting.values() if len(places) >= _slices(whole, places[0])]
        if not complete:
            return whole
        images = _images(self, whole)
        cases = [self.folded([images[i] for i in places]) for places in complete]
        others = set(range(len(images))).difference(*complete)
        return super().merge([*(images[i] for i in sorted(others)), *(c for c in cases if c is not None)])

    def complete(self, total: Arrays) -> Arrays:
        """The cases alone."""
        waiting = {place for places in _waiting(total).values() for place in places}
        if not waiting:
            return total
        return super().merge(s for place, s in enumerate(_images(self, total)) if place not in waiting)

    # -- figures -------------------------------------------------------------------------------------------------------

    def compute(self, total: Arrays) -> list[Figure]:
        """The figures, all over everything; without any case none has a value.

        Raises:
            DataError: ``missing-slice``: a volume lacks slices, so that it cannot be scored.
        """
        cases = _cases(total)
        count = len(cases.values["case"])
        figures = _figures(cases) if count else dict.fromkeys(_FIGURES)
        behind = dict.fromkeys(_FIGURES, count)
        for suffix in ("", "_greater_zero"):
            for name, lesions in (("precision", "lesions_predicted"), ("recall", "lesions_reference")):
                behind[f"lesion_{name}{suffix}"] = int(cases.values["case"][:, CASE.index(lesions)].sum())
        behind |= dict.fromkeys((f"lesion_{name}" for name in _SCORES), int(_scored(cases).sum()))
        return [Figure(name, value, support=behind[name]) for name, value in figures.items()]

    def confusion(self, total: Arrays) -> Confusion | None:
        """None."""
        return None

    def details(self, total: Arrays) -> Iterator[Detail]:
        """A row of kind ``case`` per volume, and below it one of kind ``lesion`` per lesion.

        Cases have what enters the means (9001 included), counts and volumes. ``truth_id`` is the label of a reference
        lesion, ``predicted_id`` of a predicted one; ``match`` is the same number for lesions that were merged and
        matched, whose IoU and scores (distances in mm) stand beside each of them, also where they are not detected.

        Raises:
            DataError: as ``compute``.
        """
        cases = _cases(total)
        per_case, objects = _per_case(cases), _per_object(cases)
        lesions = _named(cases.values["lesions"], LESION_OF_CASE)
        voxel_mm3 = np.prod(cases.values["spacing_mm"], axis=1)
        bounds = {name: np.concatenate([[0], np.cumsum(cases.sizes[name])]) for name in ("objects", "lesions")}
        for place, group in enumerate(cases.groups):
            yield Detail("case", {name: _value(v[place]) for name, v in per_case.items()}, group)
            mine = {name: slice(*b[place : place + 2]) for name, b in bounds.items()}
            matches = {int(n): i for i, n in enumerate(objects["number"][mine["objects"]], mine["objects"].start)}
            for is_predicted, label, number, voxels in zip(
                *(v[mine["lesions"]] for v in lesions.values()), strict=True
            ):
                match = matches.get(int(number))
                scores = {n: None if match is None else _value(objects[n][match]) for n in ("iou", *_SCORES)}
                values = {
                    "volume_mm3": float(voxels * voxel_mm3[place]),
                    "detected": 0.0 if match is None else float(objects["detected"][match]),
                    "match": None if match is None else float(number),
                    **scores,
                }
                ids = (None, int(label)) if is_predicted else (int(label), None)
                yield Detail("lesion", values, group, None, self._names[LESION], *ids)


# -- states ------------------------------------------------------------------------------------------------------------


def _pixels(truth: runlength.Runs, predicted: runlength.Runs) -> Numbers:
    """True positives, false positives, false negatives of lesion and liver in a slice, int64 of shape (2, 3)."""
    truth_ids, predicted_ids, pixels = runlength.joint_counts(truth, predicted)
    joint = np.zeros((3, 3), np.int64)
    joint[truth_ids, predicted_ids] = pixels
    sums = [(joint[i:].sum(), joint[:, i:].sum(), joint[i:, i:].sum()) for i in (LESION, LIVER)]
    return np.array([_errors(*map(int, s)) for s in sums], np.int64)


def _errors(truth: int, predicted: int, shared: int) -> list[int]:
    return [shared, predicted - shared, truth - shared]


def _named(values: NDArray[Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The columns of an array of rows."""
    return {name: values[:, place] for place, name in enumerate(names)}


def _waiting(state: Arrays) -> dict[str, list[int]]:
    """By volume the places of the slices that are no part of a case yet."""
    found: dict[str, list[int]] = {}
    for place in np.flatnonzero(state.sizes["slice"]):
        found.setdefault(state.groups[place], []).append(int(place))
    return found


def _slices(state: Arrays, place: int) -> int:
    """How many slices the volume of an image has."""
    row = int(state.sizes["slice"][:place].sum())
    return int(state.values["slice"][row, 1])


def _images(metric: ArrayMetric, state: Arrays) -> list[Arrays]:
    """The state of each image on its own."""
    bounds = {name: np.concatenate([[0], np.cumsum(size)]) for name, size in state.sizes.items()}
    images = []
    for place, (sample_id, group) in enumerate(zip(state.images, state.groups, strict=True)):
        values = {name: f.empty() for name, f in metric.fields.items()}
        values |= {name: state.values[name][b[place] : b[place + 1]] for name, b in bounds.items()}
        images.append(metric.state(sample_id, group, values))
    return images


def _cases(total: Arrays) -> Arrays:
    """The cases in the order of their files.

    Raises:
        DataError: ``missing-slice``: a volume is not complete.
    """
    for group, places in sorted(_waiting(total).items()):
        rows = total.values["slice"][np.cumsum(total.sizes["slice"])[places] - 1]
        lacking = sorted(set(range(int(rows[0, 1]))) - set(rows[:, 0].tolist()))
        problem = (
            f"{len(lacking)} of the {rows[0, 1]} slices of volume {group} cannot be scored, e.g. slice {lacking[0]}"
        )
        fix = "a volume is scored as a whole: predict on all of its slices, and mend what went wrong"
        raise DataError(problem, fix, "missing-slice")
    files = tuple(f"{group}.nii" for group in total.groups)
    ordered = Arrays(files, total.groups, total.values, total.sizes).in_order()
    return ordered


# -- figures -----------------------------------------------------------------------------------------------------------


def _scores(truth: Numbers, predicted: Numbers, shared: Numbers, distances: Floats) -> dict[str, Floats]:
    """``compute_segmentation_scores`` of any number of objects."""
    there = (truth > 0) & (predicted > 0)
    truth, predicted, shared = (np.where(there, v, 1) for v in (truth, predicted, shared))
    dice = 2.0 * shared / (truth + predicted)
    jaccard = dice / (2.0 - dice)
    found = {"dice": dice, "jaccard": jaccard, "voe": 1.0 - jaccard, "rvd": (truth - predicted) / predicted}
    found |= {name: distances[:, place] for place, name in enumerate(_SCORES[4:])}
    return {name: np.where(there, v, _NOTHING[name]) for name, v in found.items()}


def _per_object(cases: Arrays) -> dict[str, NDArray[Any]]:
    """Scores, IoU and counts of every match."""
    found = _named(cases.values["objects"], OBJECT)
    union = found["truth"] + found["predicted"] - found["shared"]
    scores = _scores(found["truth"], found["predicted"], found["shared"], cases.values["object_distances"])
    return {**found, "iou": found["shared"] / np.maximum(union, 1), **scores}


def _scored(cases: Arrays) -> NDArray[np.bool_]:
    """Which matches enter the scores of lesions."""
    detected = _named(cases.values["objects"], OBJECT)["detected"] > 0
    scored: NDArray[np.bool_] = detected & (
        cases.values["case"][:, CASE.index("scored")][cases.of_images("objects")] > 0
    )
    return scored


def _per_case(cases: Arrays) -> dict[str, Floats]:
    """Everything that is said of a case; NaN where the tumor burden is undefined."""
    case = _named(cases.values["case"], CASE)
    voxel_mm3 = np.prod(cases.values["spacing_mm"], axis=1)
    predicted_liver = np.where(case["liver_found"], case["liver_predicted"], 0)
    liver = _scores(case["liver_truth"], predicted_liver, case["liver_shared"], cases.values["distances"])
    reference = _ratio(case["lesion_truth"], case["liver_truth"], np.nan)
    predicted = np.where(case["liver_found"], _ratio(case["lesion_predicted"], case["liver_predicted"], np.nan), LARGE)
    return {
        "lesion_dice": _ratio(2.0 * case["lesion_shared"], case["lesion_truth"] + case["lesion_predicted"], 1.0),
        **{f"liver_{name}": values for name, values in liver.items()},
        "tumor_burden_reference": reference,
        "tumor_burden_predicted": predicted,
        "tumor_burden_difference": reference - predicted,
        **{f"lesions_{name}": case[f"lesions_{name}"] for name in ("reference", "predicted")},
        "lesions_found": case["found"],
        "lesions_detected": case["detected"],
        **{
            f"{what}_{'reference' if side == 'truth' else side}_mm3": case[f"{what}_{side}"] * voxel_mm3
            for what in ("lesion", "liver")
            for side in ("truth", "predicted")
        },
    }


def _ratio(part: NDArray[Any], whole: NDArray[Any], empty: float) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)


def _figures(cases: Arrays) -> dict[str, float | None]:
    """Every figure of the official file by name; ``cases`` holds one at least."""
    case, per_case, objects = _named(cases.values["case"], CASE), _per_case(cases), _per_object(cases)
    counts = {name: int(case[name].sum()) for name in CASE}
    scored = _scored(cases)
    found: dict[str, float | None] = {}
    for suffix, hits in (("", "detected"), ("_greater_zero", "found")):
        for name, all_lesions in (("precision", "lesions_predicted"), ("recall", "lesions_reference")):
            found[f"lesion_{name}{suffix}"] = counts[hits] / counts[all_lesions] if counts[all_lesions] else 0.0
    for name in _SCORES:
        found[f"lesion_{name}"] = _mean(objects[name][scored]) if scored.any() else _NOTHING[name]
    found["lesion_dice_per_case"] = _mean(per_case["lesion_dice"])
    found["lesion_dice_global"] = _dice(counts["lesion_truth"], counts["lesion_predicted"], counts["lesion_shared"])
    for name in _SCORES:
        found[f"liver_{name}"] = _mean(per_case[f"liver_{name}"])
    found["liver_dice_per_case"] = found["liver_dice"]
    there = case["liver_found"] > 0
    liver = (int(case["liver_predicted"][there].sum()), int(case["liver_shared"][there].sum()))
    found["liver_dice_global"] = _dice(counts["liver_truth"], *liver)
    burdens = per_case["tumor_burden_difference"]
    burdens = burdens[~np.isnan(burdens)]
    found["tumor_burden_rmse"] = float(np.sqrt(np.mean(np.square(burdens)))) if len(burdens) else None
    found["tumor_burden_max"] = float(np.max(burdens)) if len(burdens) else None
    return found


_FIGURES: tuple[str, ...] = (
    *(f"lesion_{name}{suffix}" for suffix in ("", "_greater_zero") for name in ("precision", "recall")),
    *(f"{what}_{name}" for what in ("lesion", "liver") for name in (*_SCORES, "dice_per_case", "dice_global")),
    *("tumor_burden_rmse", "tumor_burden_max"),
)
"""Every figure, in the order of ``_figures``."""


def _mean(values: NDArray[Any]) -> float:
    return float(np.mean(values))


def _dice(truth: int, predicted: int, shared: int) -> float | None:
    return 2.0 * shared / (truth + predicted) if truth + predicted else None


def _value(number: Any) -> float | None:
    return None if np.isnan(number) else float(number)
