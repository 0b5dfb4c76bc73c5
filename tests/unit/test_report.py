"""The report page and the pictures of the worst images, over tiny evaluations."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toy_evaluation import CLASSES, EVIL, Shot, evaluated, png_of, shots_of

from segbatch import tables
from segbatch.codecs import photo
from segbatch.errors import ConfigError
from segbatch.records import ClassInfo, ClassTable
from segbatch.report import overlay, page, sources_of, worst, write_report
from segbatch.report import worst_images as worst_of
from segbatch.runs import Run
from segbatch.stages import evaluate
from segbatch.stages.totals import Analysis


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(uri: Path) -> Reader:
    return Reader(uri.read_text())


def test_the_page_says_what_was_evaluated_and_how_well(tmp_path: Path) -> None:
    out = evaluated(tmp_path, shots_of(5))
    uri = write_report(str(out), str(tmp_path / "pages" / "report.html"), 3)
    assert uri == str(tmp_path / "pages" / "report.html")
    found = read(Path(uri))
    summary = [r for b in tables.scan(str(out), "summary") for r in b.to_pylist()]
    miou = next(r["value"] for r in summary if r["metric"] == "miou")
    assert f"{100 * miou:.2f}" in found.text
    assert any(a.get("title") == str(miou) for a in found.attributes("span"))
    wanted = ("toy val", "d1g35t", "net@", "tiles.size", str(tmp_path / "masks"), "no official evaluator", "5 ok")
    for words in wanted:
        assert words in found.text, words
    for heading in ("What was evaluated", "Classes", "Confusion", "Scores by image", "Worst images"):
        assert heading in found.text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = page.render(str(evaluated(tmp_path, shots_of(3))))
    found = Reader(text)
    assert {t for t, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object", "form"})
    sources = [v for _, a in found.tags for k, v in a.items() if k in ("src", "href", "srcset", "action")]
    assert len(sources) == 3 * 4
    assert all(v and v.startswith("data:image/jpeg;base64,") for v in sources)
    assert "url(" not in text
    assert "@import" not in text


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    shots = shots_of(4)
    shots[3].name = f'"><img src=x onerror=alert(1)>{EVIL}'
    found = Reader(page.render(str(evaluated(tmp_path, shots))))
    assert not found.attributes("script")
    assert not any("onerror" in a for _, a in found.tags)
    assert EVIL in found.text
    assert all((a.get("src") or "").startswith("data:") for a in found.attributes("img"))


def test_worst_images_come_worst_first_and_ties_by_name(tmp_path: Path) -> None:
    shots = shots_of(6)
    shots.append(Shot("a-tie", shots[5].truth, shots[5].predicted, shots[5].image))
    shots.append(Shot("nothing", np.full((4, 4), 9, np.uint16), np.zeros((4, 4), np.uint16), png_of(4, 4)))
    out = evaluated(tmp_path, shots)
    found = worst_of(str(out), 4)
    assert [w.sample_id for w in found] == ["a-tie", "s05", "s04", "s03"]
    assert [w.score for w in found] == sorted(w.score for w in found)
    assert len(worst_of(str(out), 99)) == 7
    by_name = {c.name: c for c in found[1].classes}
    assert by_name["road"].truth_pixels == 300
    assert by_name["road"].iou == 200 / 300
    assert by_name[EVIL].predicted_pixels == 100
    assert found[1].classes[0].name == EVIL


def test_pictures_stand_upright_and_are_small(tmp_path: Path) -> None:
    truth = np.zeros((300, 1000), np.uint16)
    shot = Shot("turned", truth, truth + 2, png_of(300, 1000), orientation=6)
    flat = Shot("flat", truth, truth + 2, png_of(300, 1000))
    out = evaluated(tmp_path, [shot, flat])
    panels = dict(zip(["flat", "turned"], worst.panels_of(str(out), worst_of(str(out), 2)), strict=True))
    for name, shape in (("flat", (144, 480, 3)), ("turned", (1000, 300, 3))):
        drawn = panels[name]
        pictures = (drawn.photo, drawn.truth, drawn.predicted, drawn.errors)
        assert [p.shape for p in pictures if p is not None] == [shape] * 4
    turned, flat_photo = panels["turned"].photo, panels["flat"].photo
    assert turned is not None
    assert flat_photo is not None
    assert turned[:, 0].mean() > turned[:, -1].mean()  # the bright bottom row has become the left column


def test_a_photo_that_cannot_be_read_is_said_and_does_not_matter(tmp_path: Path) -> None:
    shots = shots_of(4)
    shots[1].image = None
    shots[2].image = b"no photo at all"
    shots[3].image = png_of(7, 7)
    found = Reader(page.render(str(evaluated(tmp_path, shots))))
    assert "cannot read /nowhere/photo.png" in found.text
    assert found.text.count("The photo cannot be shown") == 3
    assert len(found.attributes("img")) == 4 + 3 * 3


def test_photos_by_reference_are_read_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png_of(20, 30))
    shots = shots_of(1)
    shots[0].image, shots[0].image_uri = None, str(tmp_path / "photo.png")
    assert len(Reader(page.render(str(evaluated(tmp_path, shots)))).attributes("img")) == 4


@pytest.mark.parametrize("gone", ["samples", "masks"])
def test_tables_that_are_gone_leave_the_figures(tmp_path: Path, gone: str) -> None:
    out = evaluated(tmp_path, shots_of(2))
    tables.write_dataset_info(str(out), {"name": "toy", "classes": CLASSES.to_json()})
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    found = Reader(page.render(str(out)))
    assert f"has no {gone} table" in found.text
    assert not found.attributes("img")
    assert "mean IoU" in found.text


def test_many_classes_show_the_top_confusions_instead(tmp_path: Path) -> None:
    classes = ClassTable(tuple(ClassInfo(i, f"c{i}") for i in range(41)))
    truth = np.arange(41, dtype=np.uint16).reshape(1, 41)
    predicted = truth.copy()
    predicted[0, :2] = [7, 7]
    found = Reader(page.render(str(evaluated(tmp_path, [Shot("a", truth, predicted, png_of(1, 41))], classes))))
    assert "Top confusions" in found.text
    assert "c0 c7 1 100.0" in found.text
    assert not [a for a in found.attributes("table") if a.get("class") == "matrix"]


def test_the_histogram_counts_every_scored_image(tmp_path: Path) -> None:
    text = page.render(str(evaluated(tmp_path, shots_of(9))))
    counts = [int(n) for n in re.findall(r"%: (\d+) images</title>", text)]
    assert len(counts) == 20
    assert sum(counts) == 9


def test_error_map_marks_wrong_and_ignored_pixels_only() -> None:
    truth = np.array([[0, 0, 9, 9]], np.uint16)
    picture = overlay.error_map(None, truth, np.array([[0, 1, 0, 9]], np.uint16), (9,))
    assert picture[0, 0].tolist() == [225, 225, 225]
    assert picture[0, 1, 0] > 200 > picture[0, 1, 1] + 100
    assert picture[0, 2].tolist() == picture[0, 3].tolist()
    assert picture[0, 2, 2] > picture[0, 2, 0]


def test_classes_without_official_colours_get_distinct_ones() -> None:
    colors = overlay.colors_of(ClassTable(tuple(ClassInfo(i, str(i)) for i in range(60))))
    assert len(set(colors.values())) == 60
    assert overlay.colors_of(CLASSES)[0] == (128, 64, 128)
    assert tuple(overlay.palette(CLASSES)[500]) == overlay.UNKNOWN_COLOR


@pytest.mark.parametrize(("draw", "kind"), [(worst.worst_overlay_jpeg, "jpeg"), (worst.worst_overlay_png, "png")])
def test_strips_hold_four_pictures_in_a_row(
    tmp_path: Path, draw: Callable[[str, worst.WorstImage], bytes | None], kind: str
) -> None:
    out = str(evaluated(tmp_path, shots_of(2)))
    data = draw(out, worst_of(out, 1)[0])
    assert data is not None
    _, info = photo.decode(data)
    assert (info.format, info.height, info.width) == (kind, 20, 4 * 30 + 3 * 6)


def test_other_roots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the output of segbatch evaluate"):
        write_report(str(tmp_path), str(tmp_path / "r.html"))
    Run.open(str(tmp_path / "m"), "state", "evaluate", {"masks": "/m", "samples": "/s", "protocol": "semantic"})
    with pytest.raises(ConfigError, match="has no summary: its evaluation has not finished"):
        write_report(str(tmp_path / "m"), str(tmp_path / "r.html"))
    assert sources_of(str(tmp_path / "m")) == worst.Sources("/m", "/s", "semantic")
    assert json.loads((tmp_path / "m/.segbatch/config.json").read_text())["verb"] == "evaluate"


def test_slices_and_intervals_are_shown(tmp_path: Path) -> None:
    out = evaluated(tmp_path, shots_of(6))
    analysis = Analysis(("'<b>' || (sample_id < 's03')",), 50, 0, "image")
    evaluate.finish(str(out), str(tmp_path / "masks"), str(tmp_path / "samples"), "semantic", analysis=analysis)
    html = page.render(str(out), 0)
    assert "&lt;b&gt;true</th>" in html and "<b>true" not in html
    summary = [r for b in tables.scan(str(out), "summary") for r in b.to_pylist()]
    miou = next(r for r in summary if (r["metric"], r["class"], r["slice"]) == ("miou", "", ""))
    assert f"{100 * miou['ci_low']:.2f}</span> – " in html
    assert {r["slice"] for r in summary} == {"", *(f"{analysis.slices[0]}=<b>{v}" for v in ("true", "false"))}
