"""The command line: exit codes, one line for a user's mistake, JSON that is nothing but JSON."""

import json
from pathlib import Path

import photos
import pytest

from segbatch import cli
from segbatch.version import __version__


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "--foo"], "Unknown option: --foo"),
        (["predict", "a", "b"], "--out"),
        (["predict", "a", "b", "c", "d"], "Unused Tokens: ['d']"),
        (["predict", "a", "b", "c", "--limit", "x"], 'unable to convert "x" into int'),
        (["predict", "a", "b", "c", "--engine", "spark"], '"auto", "ray", "inline"'),
        (["nonsense"], 'Unknown command "nonsense"'),
        (["--nonsense"], "--nonsense"),
        (["ingest", "images", "/nowhere", "/tmp/never", "--set", "plan.rows=1"], "unknown key plan.rows"),
        (["ingest", "imagez", "/nowhere", "/tmp/never"], "did you mean images?"),
        (["predict", "nonsense", "/nowhere", "/tmp/never"], "unknown model nonsense"),
        (["predict", "color@/nowhere", "/nowhere", "/tmp/never"], "/nowhere is not a trained model"),
        (["predict", "color@/nowhere", "/nowhere", "/tmp/never", "--batch-size", "0"], "neither auto nor a positive"),
        (["predict", "color@/nowhere", "/nowhere", "/tmp/never", "--max-bad-fraction", "2"], "not between 0 and 1"),
        (["status", "/nowhere"], "is not a run root"),
        (["retry", "/nowhere"], "segbatch retry /nowhere --failed"),
        (["query", "/nowhere", "SELECT 1"], "has no tables"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("segbatch: ") and err.count("\n") == 1
    assert not Path("/tmp/never").exists()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{__version__}\n")
    code, out, _ = run(capsys, "predict", "--help")
    assert code == 0
    for option in ("--max-bad-fraction", "--set", "--dry-run", "--json", "--engine"):
        assert option in out


@pytest.mark.parametrize("family", ["models", "datasets", "metrics"])
def test_catalogues(capsys: pytest.CaptureFixture[str], family: str) -> None:
    code, out, _ = run(capsys, family, "--json")
    entries = json.loads(out)
    assert code == 0 and entries
    assert all(e["name"] and e["summary"] for e in entries)


def test_ingest_status_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos.folder(tmp_path / "in", 20), str(tmp_path / "out")
    common = ["ingest", "images", str(source), out]
    code, text, _ = run(capsys, *common, "--dry-run", "--json")
    assert code == 0
    assert {k: json.loads(text)[k] for k in ("shards", "rows", "planned_rows")} == {
        "shards": 2,
        "rows": 20,
        "planned_rows": 0,
    }
    assert not Path(out).exists()

    code, text, err = run(capsys, *common, "--set", "plan.shard_rows=5", "--json")
    assert code == 0
    state = json.loads(text)
    assert (state["rows_done"], state["shards"], state["bad"], state["rows_now"]) == (20, 4, 0, 20)
    assert "20 of 20 images in 4 shards" in err

    code, text, _ = run(capsys, "query", out, "SELECT count(*) AS n FROM samples", "--json")
    assert json.loads(text) == [{"n": 20}]
    code, text, _ = run(capsys, "status", out)
    assert code == 0 and text.strip() == f"{out}: 20 of 20 rows, 4 of 4 shards, 0 bad"
    assert run(capsys, *common)[2].strip().endswith("nothing was left to do")


def test_bad_items_exit_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos.folder(tmp_path / "in", 3)
    (source / "empty.jpg").touch()
    command = ["ingest", "images", str(source), str(tmp_path / "out")]
    code, _, err = run(capsys, *command)
    assert code == 3
    assert "1 of 4 images are bad (1 empty-file), more than --max-bad-fraction 0 allows" in err
    assert run(capsys, *command, "--max-bad-fraction", "0.25")[0] == 0


@pytest.mark.parametrize("more", [[], ["--fail-fast"]])
def test_bad_items_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    source, out = photos.folder(tmp_path / "in", 3), str(tmp_path / "out")
    (source / "empty.jpg").touch()
    code, text, err = run(capsys, "ingest", "images", str(source), out, "--json", *more)
    document = json.loads(text)
    assert (code, document["bad"], document["reasons"], document["rows_now"]) == (3, 1, {"empty-file": 1}, 4)
    assert "segbatch: 1 " in err


def test_retry_counts_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos.folder(tmp_path / "in", 6), str(tmp_path / "out")
    (source / "photo-0002.jpg").write_bytes(b"")
    assert run(capsys, "ingest", "images", str(source), out)[0] == 3
    code, text, err = run(capsys, "retry", out, "--failed", "--json")
    document = json.loads(text)
    assert (code, document["rows_done"], document["rows_now"], document["rows_copied"]) == (3, 6, 1, 5)
    assert "ingest: 1 images" in err and "6 of 6 images in 1 shards, 1 bad (1 empty-file); 1 done now in" in err
    assert ", 5 kept as they were\n" in err


def test_traceback_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from segbatch.errors import ConfigError

    monkeypatch.setenv("SEGBATCH_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main(["status", str(tmp_path)])
