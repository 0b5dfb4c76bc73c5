"""The README's commands run as they stand there (test-all)."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
README = (PROJECT / "README.md").read_text()


def blocks(heading: str) -> list[str]:
    """The fenced blocks of a section."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.S)


def test_every_command_of_the_readme_exists() -> None:
    from segbatch.cli import app

    named = set(re.findall(r"^\$? ?segbatch ([a-z]+)", README, re.M)) | set(re.findall(r"`segbatch ([a-z]+)", README))
    known = {name for name in app if not name.startswith("-")}
    assert named
    assert named <= known


@pytest.mark.slow
def test_camvid_from_end_to_end(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "camvid").symlink_to(shared_data("data/camvid"))
    commands, config = blocks("CamVid from end to end")[:2]
    (tmp_path / "unet.toml").write_text(re.sub(r"max_minutes = [\d.]+", "max_minutes = 0.5", config))
    for line in commands.strip().splitlines():
        done = subprocess.run(
            [str(PROJECT / ".venv" / "bin" / "segbatch"), *line.split()[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_demo_is_useful(tmp_path: Path) -> None:
    """What `make demo` promises: above .8 mIoU, and .25 above the colour classifier."""
    from segbatch.pipeline import demo

    result = demo(str(tmp_path / "demo"))
    assert result.miou > 0.8
    assert result.miou - result.baseline_miou > 0.25
    assert result.table.num_rows >= 5
