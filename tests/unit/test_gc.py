"""Cleaning up: what goes is what nobody needs, and nothing else; what would go is said before."""

import json
import os
from dataclasses import replace
from pathlib import Path

import photos
import pytest
from doubles import FreeModel

import segbatch
from segbatch import api, cleanup, cli, drivers, jobs, planning, storage
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import ConfigError
from segbatch.runs import Run

SMALL = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=4))


def predicted(root: Path, source: Path) -> Path:
    segbatch.predict(FreeModel(), str(source), str(root), options=SMALL)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return photos.folder(tmp_path / "in", 4)


@pytest.fixture
def out(tmp_path: Path, source: Path) -> Path:
    return predicted(tmp_path / "out", source)


def tree(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def litter(out: Path) -> dict[str, Path]:
    """One file of every kind that may go."""
    service = out / ".segbatch"
    run = Run(str(out), "masks")
    shard = next(iter(run.shards()))
    run.add_quarantine(shard, "nobody.jpg", "it killed")
    (entry,) = (service / "quarantine").iterdir()
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "plan": 7}))
    dead = drivers.Heartbeat(str(out), "predict")
    dead._said = replace(dead._said, pid=2**22 + 1, process="1")  # no such process
    dead._put()
    (heartbeat,) = (service / "drivers").iterdir()
    found = {
        "temporary": out / "masks" / f".elsewhere.1.{'0' * 32}.tmp",
        "plan": service / "plans" / "0123456789abcdef" / "items-00000000.parquet",
        "outcomes": service / "outcomes" / "20200101T000000000000-000000000000.jsonl",
        "quarantine": entry,
        "driver": heartbeat,
        "probe": service / "probe-0123",
    }
    (log,) = (service / "outcomes").iterdir()
    lines = [{**json.loads(line), "etag": "of an older result"} for line in log.read_text().splitlines()]
    contents = {"outcomes": "\n".join(map(json.dumps, lines)), "temporary": "half a file", "plan": "x", "probe": "1"}
    for kind, text in contents.items():
        found[kind].parent.mkdir(exist_ok=True)
        found[kind].write_text(text)
    os.utime(found["temporary"], (0, 0))
    return found


def test_what_nobody_needs_goes_and_the_run_is_as_it_was(out: Path, source: Path) -> None:
    before, state = tree(out), api.status(str(out))
    left = litter(out)
    dry = api.gc([str(out)], dry_run=True)
    assert {g.kind: [f.uri for f in g.files] for g in dry.garbage} == {k: [str(p)] for k, p in left.items()}
    assert {g.kind: g.bytes for g in dry.garbage} == {k: p.stat().st_size for k, p in left.items()}
    assert tree(out) == before | {str(p.relative_to(out)) for p in left.values()}
    assert api.gc([str(out)]).garbage == dry.garbage
    assert tree(out) == before and not left["plan"].parent.exists()
    assert api.status(str(out)) == state
    assert api.gc([str(out)]).garbage == ()
    assert segbatch.predict(FreeModel(), str(source), str(out), options=SMALL).rows == 0


def test_a_log_that_is_still_needed_stays(out: Path) -> None:
    """Of two logs that tell the same, one goes; a quarantine that holds stays."""
    logs = out / ".segbatch" / "outcomes"
    (log,) = logs.iterdir()
    (logs / "20990101T000000000000-000000000000.jsonl").write_bytes(log.read_bytes())
    run = Run(str(out), "masks")
    run.add_quarantine(next(iter(run.shards())), "photo-0000.jpg", "it killed")
    (entry,) = api.gc([str(out)]).garbage
    assert (entry.kind, len(entry.files)) == ("outcomes", 1)
    assert list(logs.iterdir()) == [log] and set(run.quarantine()) == {"photo-0000.jpg"}


def test_a_run_in_use_is_left_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = litter(out)
    with drivers.beating(str(out), "predict"):
        with pytest.raises(ConfigError, match=r"is in use by segbatch predict on .*, process \d+"):
            api.gc([str(out)])
        cli.main(["gc", str(out.parent), "--keep-runs", "1"])
    assert f"in use: {out}: segbatch predict" in capsys.readouterr().out
    assert all(p.exists() for p in left.values())


def test_a_driver_that_is_planning_keeps_its_plan(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing of another driver's input is under way while somebody cleans up."""
    refused: list[str] = []
    publish = planning.publish

    def cleaned_meanwhile(*arguments: object, **options: object) -> object:
        with pytest.raises(ConfigError, match="in use"):
            api.gc([str(tmp_path / "out")])
        refused.append("yes")
        return publish(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "publish", cleaned_meanwhile)
    predicted(tmp_path / "out", source)
    assert refused == ["yes"]


# -- many runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nights(tmp_path: Path, source: Path) -> Path:
    """Four nights of samples and masks, an unfinished run, and things that are no runs."""
    folder = tmp_path / "nights"
    for night in range(4):
        samples = folder / f"night-{night}" / "samples"
        segbatch.ingest("images", str(source), str(samples), options=SMALL)
        predicted(folder / f"night-{night}" / "masks", samples if night == 1 else source)
        for root in (samples, folder / f"night-{night}" / "masks"):
            manifest = root / ".segbatch" / "manifest.json"
            said = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(said | {"finished": f"2026-01-0{night + 1}T03:00:00+00:00"}))
    Run.open(str(folder / "begun"), "masks", "predict", {"model": "x"})
    (folder / "notes.txt").write_text("mine")
    (folder / "night-0" / "masks" / "report.html").write_text("mine too")
    (folder / "album").mkdir()
    (folder / "album" / "part-00000000-aaaaaaaaaaaa.parquet").write_text("not a run root")
    return folder


def roots(folder: Path) -> set[str]:
    return {str(p.parent.parent.relative_to(folder)) for p in folder.rglob(".segbatch/config.json")}


def test_the_newest_of_each_verb_stay_and_what_they_were_made_from(nights: Path) -> None:
    every = roots(nights)
    dry = api.gc([str(nights)], keep_runs=3, dry_run=True)
    assert {g.root for g in dry.garbage} == {f"{nights}/night-0/samples", f"{nights}/night-0/masks"}
    assert dry.garbage[0].what.endswith("of 2026-01-01T03:00:00+00:00") and dry.garbage[0].bytes > 1000
    assert roots(nights) == every
    done = api.gc([str(nights)], keep_runs=3)
    assert done.garbage == dry.garbage
    assert roots(nights) == every - {"night-0/samples", "night-0/masks"}
    assert tree(nights / "night-0") == {"masks/report.html"}
    assert {"notes.txt", "album/part-00000000-aaaaaaaaaaaa.parquet"} <= tree(nights)
    assert api.status(str(nights / "night-1" / "masks")).complete


def test_samples_that_kept_masks_were_made_from_stay(nights: Path) -> None:
    (nights / "night-3" / "masks" / ".segbatch" / "manifest.json").unlink()  # never finished: it does not count
    done = api.gc([str(nights)], keep_runs=2)
    assert {Path(g.root).relative_to(nights).as_posix() for g in done.garbage} == {"night-0/samples", "night-0/masks"}
    assert done.kept == {f"{nights}/night-1/samples": f"{nights}/night-1/masks was made from it"}


def dated(root: Path, day: int) -> Path:
    """The run as if it had ended on that day."""
    manifest = root / ".segbatch" / "manifest.json"
    manifest.write_text(
        json.dumps(json.loads(manifest.read_text()) | {"finished": f"2026-01-{day:02d}T03:00:00+00:00"})
    )
    return root


def test_links_are_no_runs(tmp_path: Path, source: Path) -> None:
    elsewhere = dated(predicted(tmp_path / "elsewhere", source), 1)
    older, newer = (dated(predicted(tmp_path / "runs" / str(day), source), day) for day in (2, 3))
    (tmp_path / "runs" / "latest").symlink_to(newer.name)
    (tmp_path / "runs" / "z").symlink_to(elsewhere)
    before = tree(newer), tree(elsewhere)
    assert api.gc([str(tmp_path / "runs")], keep_runs=2).garbage == ()
    assert [g.root for g in api.gc([str(tmp_path / "runs")], keep_runs=1).garbage] == [str(older)]
    assert (tree(newer), tree(elsewhere)) == before
    assert api.gc([str(tmp_path / "runs"), str(tmp_path / "runs" / "latest")], keep_runs=1).garbage == ()


@pytest.mark.parametrize("place", ["d1/preds", "d1/masks", "other"])
def test_what_another_run_was_made_from_stays_wherever_that_is(tmp_path: Path, source: Path, place: str) -> None:
    runs = tmp_path / "runs"
    for day in (1, 2):
        segbatch.ingest("images", str(source), str(runs / f"d{day}"), options=SMALL)
        dated(runs / f"d{day}", day)
    (tmp_path / "by-link").symlink_to(runs / "d1")
    predicted(runs / place, tmp_path / "by-link")
    done = api.gc([str(runs)], keep_runs=1)
    assert done.garbage == () and list(done.kept) == [f"{runs}/d1"]


def test_what_a_model_was_trained_on_stays(tmp_path: Path, source: Path) -> None:
    runs = tmp_path / "runs"
    for day in (1, 2):
        segbatch.ingest("images", str(source), str(runs / f"d{day}"), options=SMALL)
        dated(runs / f"d{day}", day)
    config = runs / "model" / ".segbatch" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"train": {"samples": str(runs / "d1")}, "digest": "0"}))
    done = api.gc([str(runs)], keep_runs=1)
    assert done.garbage == () and done.kept == {f"{runs}/d1": f"{runs}/model was made from it"}
    assert config.exists()
    with pytest.raises(ConfigError, match="holds a trained model"):
        api.status(str(runs / "model"))


def test_a_driver_that_begins_meanwhile_keeps_its_plan(
    out: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, begun = Run.plans, []

    def and_another(run: Run) -> object:
        """Published after the plans were read, and before their folders are."""
        found = plans(run)
        if not begun:
            begun.append(True)
            (source / "more.jpg").write_bytes(photos.jpeg(9))
            predicted(out, source)
        return found

    monkeypatch.setattr(Run, "plans", and_another)
    assert [g.kind for g in api.gc([str(out)]).garbage] == []
    assert api.status(str(out)).rows_done == 5


def test_a_root_on_which_a_driver_has_begun_is_left_alone(out: Path) -> None:
    left = litter(out)
    found = cleanup.find([str(out)], jobs.run_of)
    with drivers.beating(str(out), "predict"):
        done = cleanup.remove(found)
    assert done.garbage == () and list(done.busy) == [str(out)]
    assert all(p.exists() for p in left.values())
    assert cleanup.remove(found).garbage == found.garbage


def test_unfinished_runs_go_only_when_asked(nights: Path) -> None:
    assert "begun" in roots(nights)
    api.gc([str(nights)], keep_runs=1)
    assert roots(nights) == {"begun", "night-3/samples", "night-3/masks"}
    created = json.loads((nights / "begun" / ".segbatch" / "config.json").read_text())
    created["created"] = "2020-01-01T00:00:00+00:00"
    (nights / "begun" / ".segbatch" / "config.json").write_text(json.dumps(created))
    (entry,) = api.gc([str(nights)], keep_runs=1, incomplete=True).garbage
    assert entry.what == "incomplete run of segbatch predict of 2020-01-01T00:00:00+00:00"
    assert not (nights / "begun").exists()


def test_wrong_use(nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(nights)
    for arguments, said in (
        ([str(nights)], "is not a run root"),
        ([f"{nights}/album", "--keep-runs", "1"], "there are no run roots below"),
        ([str(nights), "--keep-runs", "0"], "keeps nothing"),
        ([str(nights), "--incomplete"], "add --keep-runs N"),
        ([], "say where to clean up"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["gc", *arguments])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert tree(nights) == before


def test_the_command_line_says_what_would_go(nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["gc", str(nights), "--keep-runs", "3", "--dry-run"])
    text = capsys.readouterr().out
    assert f"would go: {nights}/night-0/masks: run of segbatch predict of 2026-01-01" in text
    cli.main(["gc", str(nights), "--keep-runs", "3", "--dry-run", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"] and {g["kind"] for g in document["garbage"]} == {"run"}
    assert all(storage.exists(uri) for g in document["garbage"] for uri in g["files"])
