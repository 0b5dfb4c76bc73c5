"""What a nightly run leaves in Prefect: figures, summary, link to the report, pictures of the worst masks.

Each is kept under ``<pipeline>-figures``, ``-classes``, ``-summary``, ``-report`` and ``-worst``, so that Prefect shows
its history from night to night.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from segbatch.records import Figure
from segbatch.report import WorstImage, worst_images, worst_overlay_jpeg

WORST = 3
"""Pictures of a night; each is 50 to 150 kB."""

_LINKS = ("http://", "https://", "s3://", "file://")
_COUNTS = "images_"
_CLASSES_SHOWN = 3


def publish_figures(name: str, metrics: str, figures: Sequence[Figure]) -> None:
    """Tables of the figures over all classes and of those by class.

    Args:
        name: of the pipeline.
        metrics: run root of the evaluation.
        figures: of the evaluation.
    """
    whole = [
        {"figure": f.metric, "value": _rounded(f.metric, f.value)} for f in figures if not f.class_name and not f.slice
    ]
    create_table_artifact(table=whole, key=f"{name}-figures", description=f"Figures over all classes. From {metrics}")
    rows: dict[str, dict[str, Any]] = {}
    for figure in figures:
        if figure.class_name and not figure.slice:
            row = rows.setdefault(figure.class_name, {"class": figure.class_name})
            row[figure.metric] = _rounded(figure.metric, figure.value)
    if rows:
        table = list(rows.values())
        create_table_artifact(table=table, key=f"{name}-classes", description=f"Figures by class. From {metrics}")


def publish_summary(name: str, metrics: str, report: str, headline: Mapping[str, float | None]) -> None:
    """The night in a few lines, and a link to the report where a browser or a tool can follow one.

    Args:
        name: of the pipeline.
        metrics: run root of the evaluation.
        report: URI of the report.
        headline: figures over all classes.
    """
    link = report if "://" in report else f"file://{report}"
    followed = link.startswith(_LINKS)
    if followed:
        create_link_artifact(link=link, link_text="report.html", key=f"{name}-report", description=report)
    lines = [
        f"# {name}",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {metric} | {_words(metric, value)} |" for metric, value in headline.items()),
        "",
        f"Report: [{report}]({link})" if followed else f"Report: `{report}`",
        "",
        f'`segbatch query {metrics} "SELECT sample_id, score FROM images ORDER BY score LIMIT 20"`',
    ]
    create_markdown_artifact(markdown="\n".join(lines), key=f"{name}-summary", description=f"From {metrics}")


def publish_worst(name: str, metrics: str, count: int = WORST) -> None:
    """The images with the lowest scores: photo, ground truth, prediction and errors side by side.

    Args:
        name: of the pipeline.
        metrics: run root of the evaluation.
        count: how many.
    """
    pieces = [_picture(metrics, number, image) for number, image in enumerate(worst_images(metrics, count), 1)]
    text = "\n\n".join(["# Worst images", "Photo, ground truth, prediction, errors.", *pieces])
    create_markdown_artifact(markdown=text, key=f"{name}-worst", description=f"From {metrics}")


def _picture(metrics: str, number: int, image: WorstImage) -> str:
    """Markdown of one image."""
    classes = ", ".join(f"{c.name} {c.iou:.3f}" for c in image.classes[:_CLASSES_SHOWN])
    title = f"## {number}. {_code(image.sample_id)}: mean IoU {image.score:.3f}"
    data = worst_overlay_jpeg(metrics, image)
    if data is None:
        shown = "The masks or the photo are no longer there."
    else:
        shown = f"![{number}](data:image/jpeg;base64,{base64.b64encode(data).decode()})"
    return f"{title}\n\nLowest IoU: {_code(classes)}\n\n{shown}"


def _code(text: str) -> str:
    """Text that Markdown leaves alone."""
    return f"`{text.replace('`', ' ')}`" if text else ""


def _rounded(metric: str, value: float | None) -> float | None:
    if value is None:
        return None
    return int(value) if metric.startswith(_COUNTS) else round(value, 6)


def _words(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if metric.startswith(_COUNTS) else f"{value:.4f}"
