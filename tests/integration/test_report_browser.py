"""The report in a real browser: pictures load, nothing is cut off, on a desk and on a phone."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_evaluation import evaluated, shots_of

from segbatch.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
)

PROBE = """<!DOCTYPE html>
<iframe src="report.html" style="width:%dpx;height:900px;border:0"></iframe>
<pre id="found"></pre>
<script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const texts = selector => [...page.querySelectorAll(selector)].map(e => e.textContent.trim());
  document.getElementById("found").textContent = JSON.stringify({
    width: root.clientWidth, wanted: root.scrollWidth,
    pictures: [...page.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
    headings: texts("h1, h2"), cards: texts(".card"),
    outside: [...page.querySelectorAll("body *")].filter(
      e => !e.closest(".scroll") && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName),
  });
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with the report, and the address it is served at."""
    folder = tmp_path_factory.mktemp("report")
    shots = shots_of(12, 90, 160)
    shots[11].name = "a/very/long/name/" + "without_any_place_to_break_" * 8
    shots[10].image = None
    write_report(str(evaluated(folder, shots)), str(folder / "report.html"), 12)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def look(browser: str, served: tuple[Path, str], tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_its_pictures_load(look: Callable[..., str], served: tuple[Path, str], width: int) -> None:
    folder, address = served
    (folder / f"probe-{width}.html").write_text(PROBE % width)
    dom = look("--dump-dom", f"{address}/probe-{width}.html")
    match = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(match.group(1)))
    assert found["width"] <= width
    assert found["wanted"] <= found["width"], "the page scrolls sideways"
    assert found["outside"] == []
    assert len(found["pictures"]) == 11 * 4 + 3
    assert all(complete and natural == 160 and shown > 60 for complete, natural, shown in found["pictures"])
    assert found["headings"] == [
        "toy val",
        "What was evaluated",
        "Classes",
        "Confusion",
        "Scores by image",
        "Worst images",
    ]
    assert len(found["cards"]) == 9


def test_a_screenshot_is_not_empty(look: Callable[..., str], served: tuple[Path, str], tmp_path: Path) -> None:
    from segbatch.codecs import photo

    shot = tmp_path / "page.png"
    look("--window-size=1280,1600", f"--screenshot={shot}", f"{served[1]}/report.html")
    picture, info = photo.decode(shot.read_bytes())
    assert (info.width, info.height) == (1280, 1600)
    assert len({tuple(c) for c in picture[::7, ::7].reshape(-1, 3).tolist()}) > 50
