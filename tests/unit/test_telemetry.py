"""What a call of a verb measured: shares, the line, the record."""

import json
from pathlib import Path

import generators
import photos
import pytest
import toy_evaluation
from doubles import DoubleSegmenter, FreeModel

from segbatch import api
from segbatch.config import CostConfig, EngineConfig, RunOptions
from segbatch.errors import ConfigError
from segbatch.records import Outcome
from segbatch.telemetry import Meter, Usage


def outcome(**seconds: float) -> Outcome:
    return Outcome(0, 0, rows=10, bad=1, reasons={"corrupt": 1}, bytes_out=100, seconds=seconds)


def test_shares_are_of_all_codec_threads() -> None:
    meter = Meter()
    meter.opened(2)
    meter.opened(4)
    meter.opened(3)  # one has gone
    meter.add(outcome(read=9.0, decode=9.6, model=20.0, encode=4.0, total=30.0))
    assert meter.shares(10.0) == pytest.approx({"model": 0.5, "decode": 0.24, "waiting": 0.16, "encode": 0.1})
    assert meter.line(10.0) == "bound by: model 50 % (decode 24 %, waiting 16 %, encode 10 %)"


def test_stages_that_overlap_never_make_more_than_all() -> None:
    meter = Meter()
    meter.opened(1)
    meter.add(outcome(decode=6.0, model=6.0))
    assert meter.shares(10.0) == pytest.approx({"decode": 0.5, "model": 0.5, "encode": 0.0, "waiting": 0.0})


def test_without_a_model_the_stages_share_what_they_took() -> None:
    meter = Meter()
    meter.add(outcome(read=6.0, encode=1.5, write=0.5, total=3.0))
    assert meter.shares(3.0) == pytest.approx({"read": 0.75, "encode": 0.1875, "write": 0.0625})
    assert meter.line(3.0) == "bound by: read 75 % (encode 19 %, write 6 %)"


def test_without_stages_there_is_no_line() -> None:
    meter = Meter()
    meter.add(outcome(total=3.0))
    assert (meter.shares(3.0), meter.line(3.0)) == ({}, "")


def test_cpu_seconds_count_from_when_a_worker_is_ready() -> None:
    meter = Meter()
    meter.opened(2)
    for cpu_s in (50.0, 53.0, 58.0):
        meter.used("a", Usage(cpu_s, 1 << 20, {"bytes_read": int(cpu_s)}))
    meter.used("b", Usage(20.0, 2 << 20, {"bytes_read": 2, "requests_repeated": 1}, {"busy": 0.5}))
    found = meter.to_json(10.0)
    assert found["cpu_utilisation"] == pytest.approx(8 / 20, abs=0.05)  # and what this process took meanwhile
    assert found["moved"] == {"driver": {}, "workers": {"bytes_read": 60, "requests_repeated": 1}}
    assert found["workers"]["a"] == {"cpu_s": 58.0, "peak_bytes": 1 << 20}
    assert found["workers"]["b"]["gpu"] == {"busy": 0.5}


def test_what_others_have_committed_is_not_ours() -> None:
    meter = Meter()
    meter.add(Outcome(0, 0, rows=10, bad=0, seconds={"model": 1.0}, committed_by_other=True))
    assert (meter.rows, meter.shards, meter.shares(1.0)) == (0, 0, {})


def records(root: Path) -> list[dict[str, object]]:
    return [json.loads(p.read_text()) for p in sorted((root / ".segbatch" / "runs").glob("*.json"))]


def options(per_hour: float = 0.0) -> RunOptions:
    return RunOptions(engine=EngineConfig(kind="inline", threads=2), cost=CostConfig(per_hour=per_hour))


def test_every_call_that_worked_leaves_a_record(tmp_path: Path) -> None:
    photos.folder(tmp_path / "in", 6)
    out = tmp_path / "out"
    first = api.predict(FreeModel(), str(tmp_path / "in"), str(out), options=options(3.6))
    again = api.predict(FreeModel(), str(tmp_path / "in"), str(out), options=options())
    (record,) = records(out)
    assert record == first.record
    assert again.record == {}
    assert (record["verb"], record["ended"], record["images"], record["codec_threads"]) == ("predict", "done", 6, 2)
    hours = (first.seconds + first.start_seconds) / 3600
    assert record["cost_per_1000_images"] == pytest.approx(3.6 * hours / 6 * 1000, abs=1e-6)
    shares, moved = record["shares"], record["moved"]
    assert isinstance(shares, dict) and isinstance(moved, dict)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    seconds = record["stage_seconds"]
    assert isinstance(seconds, dict) and seconds["write"] > 0
    assert moved["driver"]["bytes_read"] >= sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert moved["driver"]["bytes_written"] >= sum(p.stat().st_size for p in (out / "masks").iterdir())
    assert isinstance(record["cpu_utilisation"], float)


def test_ingest_and_evaluate_say_what_bound_them(tmp_path: Path) -> None:
    """They have no model; the seconds of their stages are shared out."""
    raw = str(generators.image_masks(tmp_path / "raw", 4))
    ingested = api.ingest("image-masks", raw, str(tmp_path / "samples"), options=options())
    assert set(ingested.record["shares"]) == {"read", "encode", "write"}
    toy_evaluation.evaluated(tmp_path / "toy", toy_evaluation.shots_of(4))
    masks, samples = str(tmp_path / "toy/masks"), str(tmp_path / "toy/samples")
    scored = api.evaluate(masks, samples, str(tmp_path / "scores"), protocol="semantic", options=options())
    assert set(scored.record["shares"]) == {"read", "count", "encode", "write"}


class Unreadable(FreeModel):
    """Its weights cannot be read."""

    def load(self, threads: int) -> DoubleSegmenter:
        raise ConfigError("no weights there", "put them there")


def test_a_call_that_failed_leaves_one_too(tmp_path: Path) -> None:
    photos.folder(tmp_path / "in", 2)
    with pytest.raises(ConfigError) as failed:
        api.predict(Unreadable(), str(tmp_path / "in"), str(tmp_path / "out"), options=options())
    (record,) = records(tmp_path / "out")
    assert record["ended"] == f"{type(failed.value).__name__}: {failed.value}"
    assert record["images"] == 0
