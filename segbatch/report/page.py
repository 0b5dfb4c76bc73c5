"""Metrics tables -> one HTML page that needs nothing else: no scripts, no links to pictures or styles."""

import base64
import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from segbatch import storage, tables
from segbatch.errors import ConfigError
from segbatch.records import OK, ClassTable
from segbatch.report import overlay
from segbatch.report import worst as cases
from segbatch.report.overlay import Rgb
from segbatch.report.worst import Panels, WorstImage
from segbatch.version import __version__

MATRIX_CLASSES = 40
"""Up to this many classes the whole confusion matrix is shown, beyond it the most frequent confusions."""

TOP_CONFUSIONS = 30
_BINS = 20
_CARDS = (
    ("miou", "mean IoU"),
    ("mean_class_accuracy", "class accuracy"),
    ("global_accuracy", "pixel accuracy"),
    ("fwiou", "frequency-weighted IoU"),
    ("mean_dice", "mean Dice"),
    ("mean_precision", "mean precision"),
    ("mean_recall", "mean recall"),
    ("segm_ap", "mask AP"),
    ("segm_ap50", "mask AP at IoU .50"),
    ("segm_ap75", "mask AP at IoU .75"),
    ("bbox_ap", "box AP"),
    ("bbox_ap50", "box AP at IoU .50"),
    ("bbox_ap75", "box AP at IoU .75"),
    ("pq", "panoptic quality"),
    ("sq", "segmentation quality"),
    ("rq", "recognition quality"),
    ("pq_things", "PQ of things"),
    ("pq_stuff", "PQ of stuff"),
    ("miiou", "mean instance-weighted IoU"),
    ("category_miou", "mean IoU of categories"),
    ("ap", "mask AP"),
    ("ap50", "mask AP at IoU .50"),
    ("mean_boundary_iou", "mean boundary IoU"),
    ("miou_present", "mean IoU of classes that are there"),
    ("pooled_f1", "F1 of all pixels"),
    ("image_mean_f1", "F1, mean over images"),
    ("lesion_dice_per_case", "lesion Dice, mean over cases"),
    ("lesion_dice_global", "lesion Dice of all voxels"),
    ("liver_dice_per_case", "liver Dice, mean over cases"),
)
_PER_CLASS = {
    "iou": "IoU",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "dice": "Dice",
    "segm_ap": "Mask AP",
    "segm_ap50": "Mask AP50",
    "segm_ap75": "Mask AP75",
    "bbox_ap": "Box AP",
    "bbox_ap50": "Box AP50",
    "bbox_ap75": "Box AP75",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "iiou": "iIoU",
    "boundary_iou": "Boundary IoU",
    "ap": "AP",
    "ap50": "AP50",
}
"""Figures by class that the page shows, and the heads of their columns."""

_MOST_CARDS = 8
_SLICE_FIGURES = 6

_UNITS = {"instances": "objects", "panoptic": "segments"}
_SCORES = {
    "semantic": "the mean IoU over the classes that it shows or predicts",
    "instances": "the mean mask AP over the classes that it shows, as if it were the only image",
    "panoptic": "its own panoptic quality",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A figure at the top of the page: value 0..1 (None: undefined), or a count.

    ``plain`` says that the value is no share; ``interval`` is its 95 % interval.
    """

    title: str
    value: float | None = None
    count: int | None = None
    plain: bool = False
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Further:
    """A figure over all classes that is no card: value 0..1 (None: undefined), and objects behind it."""

    name: str
    value: float | None
    support: int | None
    plain: bool = False
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class SliceRow:
    """A part of the data: ``values`` by figure."""

    name: str
    support: int | None
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A line of the per-class table; ``values`` by metric name."""

    name: str
    color: str
    support: int
    share: float
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the confusion matrix: share of the row 0..1, None for an empty row."""

    share: float | None
    pixels: int
    right: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A frequent confusion; ``share`` of the true class's pixels."""

    truth: str
    predicted: str
    pixels: int
    share: float


@dataclass(frozen=True, slots=True)
class Matrix:
    """The confusion matrix, and the pairs that are confused most."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """All images: counts by status, and how the scores of the scored ones are spread over equal bins of 0..1."""

    statuses: dict[str, int]
    bins: tuple[int, ...]
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of an image as a data URI."""

    title: str
    data: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class WorstCard:
    """One of the worst images with its pictures."""

    image: WorstImage
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def write_report(metrics_root: str, out_uri: str, worst: int = 20) -> str:
    """Write the page of a finished evaluation; returns its URI.

    Args:
        metrics_root: the evaluation's run root.
        out_uri: where the page goes; replaced when it is there.
        worst: how many of the worst images are shown with pictures; 0 for none.

    Raises:
        ConfigError: the root is no evaluation, or one that has not finished.
        StorageError: the page cannot be written.
    """
    out = storage.resolve(out_uri)
    storage.replace(out, render(storage.resolve(metrics_root), worst).encode())
    return out


def render(root: str, worst: int = 20) -> str:
    """The page as text; see ``write_report``."""
    import jinja2

    sources = cases.sources_of(root)
    if not tables.has(root, "summary"):
        raise ConfigError(f"{root} has no summary: its evaluation has not finished", "run segbatch evaluate again")
    summary = [row for batch in tables.scan(root, "summary") for row in batch.to_pylist()]
    classes, task = cases.classes_of(root), cases.task_of(sources.protocol)
    heads, plain = _heads(summary), _plain(sources.protocol)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segbatch", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, count=_count)
    return environment.get_template("report.html.j2").render(
        dataset=summary[0]["dataset"] if summary else "",
        split=summary[0]["split"] if summary else "",
        protocol=sources.protocol,
        cards=_cards(summary, plain),
        further=_further(summary, plain),
        slices=_slices(summary),
        plain=plain,
        facts=_facts(root, sources),
        config=_model_config(sources.masks),
        class_rows=_class_rows(summary, classes, next(iter(heads), "")),
        heads=heads,
        unit=_UNITS.get(task, "pixels"),
        what_score=_SCORES.get(task, "what its protocol says"),
        matrix=_matrix(root),
        scores=_scores(root),
        worst=list(_worst_cards(root, worst)),
        legend=_legend(classes),
        wrong=_css(overlay.WRONG_COLOR),
        ignored=_css(overlay.IGNORED_COLOR),
        version=__version__,
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _percent(value: float | None, digits: int = 1) -> str:
    """``0.7103`` -> ``71.0``; a dash where it is undefined."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _count(value: float) -> str:
    """Thousands apart by thin spaces."""
    return f"{int(value):,}".replace(",", "\u2009")


def _css(color: tuple[int, int, int]) -> str:
    return f"rgb({color[0]},{color[1]},{color[2]})"


def _whole(summary: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows over all classes by figure."""
    return {row["metric"]: row for row in summary if not row["class"] and not row["slice"]}


def _plain(protocol: str) -> frozenset[str]:
    """Names of figures that are no shares."""
    from segbatch.metrics import registry

    found = getattr(registry.metric(protocol), "unbounded", ()) if protocol in registry.names() else ()
    return frozenset(found)


def _at_the_top(summary: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Titles of the figures that stand on cards: those known here; the first ones where there is none of them."""
    whole = _whole(summary)
    known = {name: title for name, title in _CARDS if name in whole}
    return known or {n: n for n in [n for n in whole if not n.startswith("images_")][:_MOST_CARDS]}


def _interval(row: dict[str, Any]) -> tuple[float, float] | None:
    return None if row["ci_low"] is None else (row["ci_low"], row["ci_high"])


def _cards(summary: Sequence[dict[str, Any]], plain: frozenset[str]) -> list[Card]:
    whole = _whole(summary)
    cards = [
        Card(title, whole[name]["value"], plain=name in plain, interval=_interval(whole[name]))
        for name, title in _at_the_top(summary).items()
    ]
    for name, title in (
        ("images_scored", "images scored"),
        ("images_skipped", "images left out"),
        ("images_missing", "images without prediction so far"),
        ("images_counted_empty", "images without prediction, counted as empty"),
    ):
        if name in whole and (whole[name]["value"] or name in ("images_scored", "images_skipped")):
            cards.append(Card(title, count=int(whole[name]["value"] or 0)))
    return cards


def _further(summary: Sequence[dict[str, Any]], plain: frozenset[str]) -> list[Further]:
    """What stands on no card."""
    known = _at_the_top(summary)
    others = {n: row for n, row in _whole(summary).items() if n not in known and not n.startswith("images_")}
    return [Further(n, row["value"], row["support"], n in plain, _interval(row)) for n, row in others.items()]


def _slices(summary: Sequence[dict[str, Any]]) -> tuple[dict[str, str], list[SliceRow]]:
    """Heads of the columns by figure, and the parts of the data in the order of the summary."""
    heads = dict(list(_at_the_top(summary).items())[:_SLICE_FIGURES])
    found: dict[str, SliceRow] = {}
    for row in summary:
        if row["slice"] and not row["class"]:
            part = found.setdefault(row["slice"], SliceRow(row["slice"], row["support"], {}))
            part.values[row["metric"]] = row["value"]
    return heads, list(found.values())


def _heads(summary: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Heads of the columns of the per-class table by figure; the first six where none is known here."""
    there = list(dict.fromkeys(row["metric"] for row in summary if row["class"] and not row["slice"]))
    return {n: head for n, head in _PER_CLASS.items() if n in there} or {n: n for n in there[:6]}


def _facts(root: str, sources: cases.Sources) -> list[tuple[str, str]]:
    """What was evaluated: (name, value) by line."""
    from segbatch.metrics import registry

    settings = {k: v for k, v in cases.document_of(root)["config"].items() if k in ("options", "class_map")}
    document, model = cases.document_of(root), cases.document_of(sources.masks).get("config", {})
    known = registry.metric(sources.protocol) if sources.protocol in registry.names() else None
    facts = [
        ("Model", str(model.get("model", ""))),
        ("Model digest", _digest(sources.masks)),
        ("Masks", sources.masks),
        ("Samples", sources.samples),
        ("Protocol", sources.protocol),
        ("Settings", ", ".join(f"{k} = {v}" for k, v in _flat(settings, ""))),
        ("Defined by", str(getattr(known, "source", ""))),
        ("Evaluation begun", str(document.get("created", ""))),
        ("Evaluated by", f"segbatch {document['segbatch']}" if "segbatch" in document else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _digest(masks: str) -> str:
    """Digests of the models that made the masks, as far as the first rows of each part say."""
    if not tables.has(masks, "masks"):
        return "(the masks table is not there any more)"
    found: dict[str, None] = {}
    for part in tables.parts(tables.find(masks, "masks")):
        for batch in tables.batches(part.uri, "masks", ("model_digest",), stop=1):
            found[batch.column("model_digest")[0].as_py()] = None
    return ", ".join(found)


def _model_config(masks: str) -> list[tuple[str, str]]:
    """The configuration of the predict run, flat."""
    return list(_flat(cases.document_of(masks).get("config", {}), ""))


def _flat(config: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        elif value not in ("", None, [], ()):
            yield f"{path}{key}", str(value)


def _class_rows(summary: Sequence[dict[str, Any]], classes: ClassTable, by: str) -> list[ClassRow]:
    """The best by figure ``by`` first; classes without ground truth last."""
    values: dict[str, dict[str, float | None]] = {}
    support: dict[str, int] = {}
    for row in summary:
        if row["class"] and not row["slice"]:
            values.setdefault(row["class"], {})[row["metric"]] = row["value"]
            support.setdefault(row["class"], row["support"] or 0)
    whole = sum(support.values()) or 1
    colors = {c.name: _css(overlay.colors_of(classes)[c.label_id]) for c in classes.classes}
    rows = [ClassRow(n, colors.get(n, ""), support[n], support[n] / whole, v) for n, v in values.items()]
    return sorted(rows, key=lambda r: (r.support == 0, -(r.values.get(by) or 0.0)))


def _matrix(root: str) -> Matrix:
    """The confusion table as rows of shares; columns are the classes and, after them, other predicted ids."""
    pixels: dict[tuple[str, str], int] = {}
    for batch in tables.scan(root, "confusion"):
        for row in batch.to_pylist():
            pixels[row["truth"], row["predicted"]] = row["pixels"]
    if not pixels:
        return Matrix((), (), ())
    summary = [r for b in tables.scan(root, "summary", ("metric", "class")) for r in b.to_pylist()]
    names = list(dict.fromkeys(r["class"] for r in summary if r["class"]))
    others = [p for p in dict.fromkeys(predicted for _, predicted in pixels) if p not in names]
    totals: Counter[str] = Counter()
    for (truth, _), n in pixels.items():
        totals[truth] += n
    wrong = sorted(((n, t, p) for (t, p), n in pixels.items() if t != p), key=lambda w: (-w[0], w[1], w[2]))
    pairs = tuple(Pair(t, p, n, n / totals[t]) for n, t, p in wrong[:TOP_CONFUSIONS])
    if len(names) > MATRIX_CLASSES:
        return Matrix((), (), pairs)
    columns = (*names, *others)
    rows = tuple((t, tuple(_cell(pixels.get((t, p), 0), totals[t], t == p) for p in columns)) for t in names)
    return Matrix(columns, rows, pairs)


def _cell(pixels: int, total: int, right: bool) -> Cell:
    return Cell(pixels / total if total else None, pixels, right)


def _scores(root: str) -> Scores:
    """One pass over the images table."""
    statuses: Counter[str] = Counter()
    bins = [0] * _BINS
    total, low, high, scored = 0.0, 1.0, 0.0, 0
    for batch in tables.scan(root, "images", ("status", "score")):
        statuses.update(batch.column("status").to_pylist())
        for score in batch.column("score").to_pylist():
            if score is not None:
                bins[min(int(score * _BINS), _BINS - 1)] += 1
                total, scored = total + score, scored + 1
                low, high = min(low, score), max(high, score)
    ordered = {OK: statuses.pop(OK, 0), **dict(sorted(statuses.items()))}
    if not scored:
        return Scores(ordered, tuple(bins), None, None, None)
    return Scores(ordered, tuple(bins), total / scored, low, high)


def _worst_cards(root: str, count: int) -> Iterator[WorstCard]:
    images = cases.worst_images(root, count)
    for image, panels in zip(images, cases.panels_of(root, images), strict=True):
        yield WorstCard(image, tuple(_pictures(panels)), panels.notes)


def _pictures(panels: Panels) -> Iterator[Picture]:
    titles = (
        ("Photo", panels.photo),
        ("Ground truth", panels.truth),
        ("Prediction", panels.predicted),
        ("Errors", panels.errors),
    )
    for title, picture in titles:
        if picture is not None:
            yield Picture(title, _data_uri(picture), picture.shape[1], picture.shape[0])


def _data_uri(picture: Rgb) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(overlay.encode_jpeg(picture)).decode()}"


def _legend(classes: ClassTable) -> list[tuple[str, str]]:
    colors = overlay.colors_of(classes)
    return [(c.name, _css(colors[c.label_id])) for c in classes.classes]
