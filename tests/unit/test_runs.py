"""The run protocol without an engine: claim, commit, resume, finish, quarantine."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from simulated_run import SimulatedRun

from segbatch import schemas, shards, tables
from segbatch.config import PlanConfig
from segbatch.errors import ConfigError, EngineError, IncompleteRunError, StoppedError
from segbatch.records import Outcome, PlanItem, ShardRef
from segbatch.runs import Run, commit, committed, items_of

CONFIG = {"source": "/in", "options": {"a": 1}}


def writer_of(shard: ShardRef, status: str = "ok", rows: int | None = None) -> tables.PartWriter:
    """A finished samples part for the shard's items."""
    items = items_of(shard)[:rows]
    columns = {f.name: [None] * len(items) for f in schemas.SAMPLES}
    columns |= {
        "sample_id": [i.sample_id for i in items],
        "image_uri": [i.uri for i in items],
        "etag": [i.etag for i in items],
        "status": [status] * len(items),
    }
    writer = tables.PartWriter("samples")
    arrays = [pa.array(columns[f.name], f.type) for f in schemas.SAMPLES]
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schemas.SAMPLES))
    return writer


def work(run: Run, shard: ShardRef, status: str = "ok") -> Outcome:
    outcome = commit(shard, writer_of(shard, status), {"total": 1.0})
    run.record(outcome)
    return outcome


def images(count: int, etag: str = "1") -> list[PlanItem]:
    return [PlanItem(f"{i}.jpg", f"/in/{i}.jpg", etag, 10) for i in range(count)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(str(tmp_path), "samples", "ingest", CONFIG)
    run.plan(lambda: images(10), PlanConfig(shard_rows=4))
    return run


def attempts(run: Run) -> dict[int, str]:
    """Who wrote each shard."""
    found = {}
    for part in tables.parts(f"{run.root}/samples"):
        footer = tables.footer(part.uri)
        found[int(footer["segbatch.shard"])] = footer["segbatch.attempt"]
    return found


# -- claim -----------------------------------------------------------------------------------------------------------


def test_same_configuration_joins_another_is_refused(tmp_path: Path) -> None:
    Run.open(str(tmp_path), "samples", "ingest", CONFIG)
    Run.open(str(tmp_path), "samples", "ingest", json.loads(json.dumps(CONFIG)))
    with pytest.raises(ConfigError, match=r"another configuration: options.a: 1 -> 2; x: None -> 3 .choose another"):
        Run.open(str(tmp_path), "samples", "ingest", {"source": "/in", "options": {"a": 2}, "x": 3})
    with pytest.raises(ConfigError, match="holds the output of segbatch ingest"):
        Run.open(str(tmp_path), "masks", "predict", CONFIG)


def test_racing_claims(tmp_path: Path) -> None:
    """Of drivers with different configurations one wins; all others are refused."""
    won, refused = [], []

    def claim(i: int) -> None:
        try:
            Run.open(str(tmp_path), "samples", "ingest", {"i": i})
            won.append(i)
        except ConfigError:
            refused.append(i)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 7
    assert (Run(str(tmp_path), "samples").document() or {})["config"] == {"i": won[0]}


# -- work and resume -------------------------------------------------------------------------------------------------


def test_resume_does_what_is_missing(run: Run) -> None:
    todo = list(run.missing())
    assert [s.number for s in todo] == [0, 1, 2]
    assert committed(todo[1]) is None
    outcome = work(run, todo[1])
    assert (outcome.rows, outcome.bad, outcome.committed_by_other, outcome.plan) == (4, 0, False, 0)
    assert [s.number for s in run.missing()] == [0, 2]
    with pytest.raises(IncompleteRunError, match=r"1 of 3 shards and 4 of 10 rows are there; missing: shard 0, 2"):
        run.finish()
    work(run, todo[0])
    work(run, todo[2])
    state = run.finish()
    assert (state.complete, state.rows_done, state.shards_done, state.bad) == (True, 10, 3, 0)
    names = {p.name for p in (Path(run.root) / ".segbatch").iterdir()}
    assert {"config.json", "manifest.json", "plans", "outcomes", "SUCCESS-0"} <= names
    assert run.finish() == state


def test_second_commit_changes_nothing(run: Run) -> None:
    shard = next(iter(run.missing()))
    first = work(run, shard)
    second = commit(shard, writer_of(shard, "truncated"), {})
    assert (second.committed_by_other, second.bad, second.etag) == (True, 0, first.etag)
    again = committed(shard)
    assert again is not None and again.committed_by_other and again.etag == first.etag


def test_racing_commits(run: Run) -> None:
    shard = next(iter(run.missing()))
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(commit(shard, writer_of(shard), {}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not o.committed_by_other for o in outcomes) == 1
    assert len({o.etag for o in outcomes}) == 1
    assert os.listdir(f"{run.root}/samples") == [shard.key]


def test_wrong_number_of_rows_is_refused(run: Run) -> None:
    shard = next(iter(run.missing()))
    with pytest.raises(EngineError, match="shard 0: 3 rows instead of 4"):
        commit(shard, writer_of(shard, rows=3), {})
    assert [s.number for s in run.missing()] == [0, 1, 2]


def test_file_of_another_shard_is_refused(run: Run) -> None:
    first, second, _ = run.missing()
    work(run, first)
    os.rename(first.uri, second.uri)
    with pytest.raises(EngineError, match="is not the result of shard 1"):
        commit(second, writer_of(second), {})


# -- rewrites and retries --------------------------------------------------------------------------------------------


def rewritten(run: Run) -> ShardRef:
    """Plan again with the first image changed; the shard that holds it."""
    run.plan(lambda: [replace(images(1)[0], etag="2"), *images(10)[1:]], PlanConfig(shard_rows=4))
    return next(s for s in run.shards() if s.mode == "rewrite")


def test_rewrite_replaces_the_older_result(run: Run) -> None:
    for shard in run.missing():
        work(run, shard)
    before = attempts(run)
    shard = rewritten(run)
    assert [s.number for s in run.missing()] == [0]
    assert committed(shard) is None
    assert not run.state().complete
    assert not work(run, shard).committed_by_other
    after = attempts(run)
    assert before[0] != after[0] and before[1] == after[1]
    assert committed(shard) is not None
    assert run.finish().rows_done == 10


def test_older_plan_never_overwrites(run: Run) -> None:
    """A driver that is late with a shard of plan 0 finds that of plan 1 there, and the other way round."""
    late, second, third = run.missing()
    shard = rewritten(run)
    work(run, shard)
    before = attempts(run)
    outcome = commit(late, writer_of(late), {})
    assert (outcome.committed_by_other, outcome.plan) == (True, 1)
    assert attempts(run) == before
    outcome = commit(replace(late, mode="retry"), writer_of(late), {}, basis="whatever it was")
    assert outcome.committed_by_other and attempts(run) == before
    for other in (second, third):
        work(run, other)
    assert run.finish().complete


def test_retry_redoes_bad_shards_once(run: Run) -> None:
    for shard, status in zip(list(run.missing()), ("ok", "truncated", "ok"), strict=True):
        work(run, shard, status)
    state = run.finish()
    assert (state.bad, state.reasons) == (4, {"truncated": 4})
    (shard,) = run.failed()
    assert (shard.number, shard.mode) == (1, "retry")
    assert committed(shard) is None
    basis = run.outcomes()[1].etag
    assert not commit(shard, writer_of(shard), {}, basis=basis).committed_by_other
    assert commit(shard, writer_of(shard, "truncated"), {}, basis=basis).committed_by_other  # too late
    assert run.finish().bad == 0
    assert list(run.failed()) == []


def test_a_retry_of_an_older_plan_never_overwrites(run: Run) -> None:
    """It reads the shard's result, and so its tag, when another driver has made it anew already."""
    for shard in list(run.missing()):
        work(run, shard, "truncated")
    late = next(s for s in run.failed() if s.number == 0)
    outcome = work(run, rewritten(run))
    assert commit(late, writer_of(late), {}, basis=outcome.etag).committed_by_other
    assert run.state().complete


def test_what_a_plan_needs_is_written_before_it_is_there(run: Run) -> None:
    seen: list[int] = []
    run.plan(lambda: images(12), PlanConfig(shard_rows=4), before=lambda: seen.append(len(run.plans())))
    assert seen == [1] and len(run.plans()) == 2
    run.plan(lambda: images(12), PlanConfig(shard_rows=4), before=lambda: seen.append(-1))
    assert seen == [1]


def test_failed_leaves_out_what_is_to_be_rewritten(run: Run) -> None:
    for shard in run.missing():
        work(run, shard, "truncated")
    rewritten(run)
    assert [s.number for s in run.failed()] == [1, 2]


# -- outcomes --------------------------------------------------------------------------------------------------------


def test_outcomes_with_equal_tags_are_told_apart(run: Run) -> None:
    """Two shards of one size written within one tick of the clock have equal tags."""
    for shard, status in zip(list(run.missing()), ("ok", "truncated", "ok"), strict=True):
        outcome = work(run, shard, status)
        os.utime(shard.uri, ns=(10**18, 10**18))
        run._log[-1] = replace(outcome, etag=f"{os.stat(shard.uri).st_size}-{10**18}")
    run.flush()
    by_number = run.outcomes()
    assert {n: o.bad for n, o in by_number.items()} == {0: 0, 1: 4, 2: 0}
    assert [s.number for s in run.failed()] == [1]


def test_outcomes_come_from_footers_where_logs_are_lost(run: Run) -> None:
    for shard in run.missing():
        commit(shard, writer_of(shard, "truncated"), {"total": 2.0})
    state = run.finish()
    assert (state.rows_done, state.bad, state.reasons) == (10, 10, {"truncated": 10})


def test_log_is_written_in_bulk(run: Run) -> None:
    for shard in run.missing():
        work(run, shard)
    assert not (Path(run.root) / ".segbatch" / "outcomes").exists()
    run.flush()
    run.flush()
    (log,) = (Path(run.root) / ".segbatch" / "outcomes").iterdir()
    assert [json.loads(line)["shard"] for line in log.read_text().splitlines()] == [0, 1, 2]


# -- many shards -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_long_run_costs_few_calls_and_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 shards: each is made into an object once, the table is listed as often as it was with three."""
    made = 0

    class Counted(ShardRef):
        def __init__(self, *arguments: object) -> None:
            nonlocal made
            made += 1
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "ShardRef", Counted)
    lists = {}
    for count in (3, 20_000):
        simulated = SimulatedRun(tmp_path / str(count), count)
        with simulated.patched():
            simulated.limit, made = count // 2, 0
            with pytest.raises(StoppedError):
                simulated.carry_out()
            assert made == count // 2 + 1  # the one that was not begun
            again = SimulatedRun(tmp_path / str(count), count)
            again.store.is_there = simulated.store.is_there
        with again.patched():
            made = 0
            result = again.carry_out()
        lists[count] = again.store.calls.pop("list")
        assert (made, result.rows, result.state.rows_done) == (count - count // 2,) * 2 + (count,)
        assert again.store.calls == {"work": count - count // 2}  # no footer is read: the logs tell all
    assert lists[20_000] == lists[3] <= 4
    logs = list((tmp_path / "20000" / ".segbatch" / "outcomes").iterdir())
    assert len(logs) <= 20_000 // 256 + 4


def test_what_the_logs_lack_is_read_from_footers_once(tmp_path: Path) -> None:
    simulated = SimulatedRun(tmp_path, 1000)
    simulated.store.is_there[:] = True
    with simulated.patched():
        result = simulated.carry_out()
    assert (result.rows, result.state.rows_done) == (0, 1000)
    assert simulated.store.calls["footer"] == 1000 and simulated.store.calls["work"] == 0


def test_outcomes_of_a_newer_version_are_understood(run: Run) -> None:
    for shard in run.missing():
        work(run, shard, "truncated")
    run.flush()
    (log,) = (Path(run.root) / ".segbatch" / "outcomes").iterdir()
    lines = [json.dumps({**json.loads(line), "news": 1}) for line in log.read_text().splitlines()]
    log.write_text("\n".join(lines))
    assert run.state().bad == 10


# -- quarantine ------------------------------------------------------------------------------------------------------


def test_quarantine_holds_until_the_file_changes(run: Run) -> None:
    shards = {s.number: s for s in run.shards()}
    run.add_quarantine(shards[0], "0.jpg", "it kills")
    run.add_quarantine(shards[0], "1.jpg", "it kills too")
    run.add_quarantine(shards[1], "5.jpg", "and so does this")
    assert set(run.quarantine()) == {"0.jpg", "1.jpg", "5.jpg"}
    rewritten(run)
    assert run.quarantine() == {"1.jpg": "it kills too", "5.jpg": "and so does this"}
    run.clear_quarantine()
    assert run.quarantine() == {}


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "rows"), [(100.0, 16), (1.0, 120), (0.001, 8192)])
def test_later_plans_size_their_shards_by_what_rows_took(tmp_path: Path, seconds: float, rows: int) -> None:
    first = Run(str(tmp_path), "masks")
    first.plan(lambda: images(4), PlanConfig(shard_rows=2))
    for shard in list(first.missing()):
        first.record(commit(shard, writer_of(shard), {"total": seconds * shard.rows}))
    first.flush()
    first.plan(lambda: images(20_000), PlanConfig())
    assert max(s.rows for s in first.missing()) == rows
    first.plan(lambda: images(20_100), PlanConfig())  # a small one is still spread over some shards
    assert max(s.rows for s in first.missing() if s.plan == 2) == min(rows, 16)
