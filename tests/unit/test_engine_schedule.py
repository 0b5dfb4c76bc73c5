"""The queue of shards, and how many actors a cluster carries: no Ray."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import engine_doubles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segbatch.config import EngineConfig, RunOptions, parse
from segbatch.engine.activity import Activity
from segbatch.engine.journal import FileJournal, NullJournal, read
from segbatch.engine.layout import Node, Share, layout, places, within
from segbatch.engine.schedule import Schedule
from segbatch.errors import ConfigError, EngineError
from segbatch.records import ShardRef


def shards(count: int, rows: int = 10) -> list[ShardRef]:
    return engine_doubles.shards(Path("out"), count, rows)


def taken(schedule: Schedule) -> ShardRef:
    shard = schedule.take()
    assert shard is not None
    return shard


def paced(count: int = 6, patience: float = 3.0) -> tuple[Schedule, list[ShardRef]]:
    """All shards in flight, and three more finished, which took 10 s each."""
    schedule = Schedule(shards(count + 3), 3, patience)
    for _ in range(3):
        assert schedule.finished(taken(schedule), 10.0)
    return schedule, [taken(schedule) for _ in range(count)]


def test_first_copy_counts() -> None:
    schedule, (first, second) = paced(2)
    schedule.copy(first)
    assert schedule.finished(first, 50.0)
    assert not schedule.is_open(first.number) and schedule.has_work()
    assert not schedule.finished(first, 60.0)
    assert schedule.is_open(second.number)
    assert schedule.finished(second, 10.0)
    assert not schedule.has_work()
    schedule.check()


def test_failure_of_one_copy_is_none() -> None:
    schedule, (shard,) = paced(1)
    schedule.copy(shard)
    schedule.failed(shard, "its actor died")
    assert schedule.queued(1) == 0 and schedule.is_open(shard.number)
    schedule.failed(shard, "its actor died")
    assert schedule.queued(1) == 1
    assert taken(schedule) == shard
    schedule.copy(shard)
    assert schedule.finished(shard, 1.0)
    schedule.failed(shard, "too late to matter")
    assert not schedule.has_work()
    schedule.check()


def test_what_has_failed_is_worked_on_alone() -> None:
    """Else a shard that waits behind one that hangs would fail as often as that one."""
    schedule = Schedule(shards(4), 3, 0.0)
    first, second = taken(schedule), taken(schedule)
    schedule.failed(first, "nothing was done")
    schedule.failed(second, "nothing was done")
    third = schedule.take(beside=[99])
    assert third is not None and third.number == 2, "an actor with work gets what has not failed"
    assert schedule.take() == first and schedule.take(beside=[first.number]) is None, "and nothing comes beside it"
    fourth = schedule.take(beside=[third.number])
    assert fourth is not None and fourth.number == 3
    assert schedule.take(beside=[third.number]) is None and schedule.queued(9) == 1
    schedule.put_back(first)
    assert [schedule.take(), schedule.take(), schedule.take()] == [first, second, None]


def test_attempts_are_counted_where_they_are_charged() -> None:
    schedule, (shard,) = paced(1)
    for _ in range(5):
        schedule.put_back(shard)
        assert taken(schedule) == shard
    for _ in range(3):
        schedule.failed(shard, "the store is down", "on node n, process 1")
        schedule.take()
    assert not schedule.has_work()
    with pytest.raises(EngineError, match="shard 3 failed 3 times: the store is down") as caught:
        schedule.check()
    assert "on node n, process 1" in caught.value.fix


def test_put_back_is_next() -> None:
    schedule = Schedule(shards(5), 3, 0)
    first = taken(schedule)
    schedule.put_back(first)
    assert taken(schedule) == first


def test_straggler_is_the_latest_for_its_rows() -> None:
    schedule, (small, other, retried) = paced(3)
    large = replace(small, number=77, rows=100)
    schedule.copy(large)
    assert schedule.straggler([(small, 29.0), (large, 290.0)]) is None
    assert schedule.straggler([(small, 31.0), (large, 290.0)]) == small
    assert schedule.straggler([(small, 31.0), (other, 40.0)]) == other
    assert schedule.straggler([(replace(retried, mode="retry"), 99.0)]) is None
    schedule.copy(small)
    assert schedule.straggler([(small, 99.0), (small, 5.0)]) is None


def test_no_straggler_without_a_measure() -> None:
    assert paced(1, patience=0)[0].straggler([(shards(4)[3], 1e6)]) is None
    schedule = Schedule(shards(3), 3, 3.0)
    first, second = taken(schedule), taken(schedule)
    assert schedule.finished(first, 1.0)
    assert schedule.straggler([(second, 1e6)]) is None


def test_short_shards_are_no_stragglers() -> None:
    schedule = Schedule(shards(5), 3, 3.0)
    for _ in range(4):
        schedule.finished(taken(schedule), 0.001)
    assert schedule.straggler([(taken(schedule), 1.0)]) is None


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_every_shard_is_finished_once(count: int, seed: int) -> None:
    """Whatever copies come to, in whatever order."""
    chance = random.Random(seed)
    schedule = Schedule(iter(shards(count)), 10**6, 1.0)
    flying: list[ShardRef] = []
    finished: Counter[int] = Counter()
    while schedule.has_work():
        if len(flying) < 4 and (shard := schedule.take()) is not None:
            flying.append(shard)
        elif flying and chance.random() < 0.3:
            shard = chance.choice(flying)
            if schedule.is_open(shard.number):
                flying.append(schedule.copy(shard))
        if flying and chance.random() < 0.7:
            shard = flying.pop(chance.randrange(len(flying)))
            event = chance.random()
            if event < 0.6:
                finished[shard.number] += schedule.finished(shard, 1.0)
            elif event < 0.8:
                schedule.failed(shard, "chance")
            else:
                schedule.put_back(shard)
    assert finished == dict.fromkeys(range(count), 1)
    while flying:
        assert not schedule.finished(flying.pop(), 1.0)
    assert not schedule.has_work()


# -- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "least", "most", "gpus", "expected"),
    [
        ([Node(2)], 0, 0, 0.0, (1, Share(1))),
        ([Node(1)], 0, 0, 0.0, (1, Share(1))),
        ([Node(16)], 0, 0, 0.0, (3, Share(5))),
        ([Node(16)], 5, 5, 0.0, (5, Share(3))),
        ([Node(16)], 0, 2, 0.0, (2, Share(7))),
        ([Node(16)], 6, 0, 0.0, (6, Share(2))),
        ([Node(0), Node(4)], 0, 0, 0.0, (1, Share(3))),
        ([Node(4)] * 4, 0, 0, 0.0, (4, Share(3))),
        ([Node(4)] * 4, 100, 0, 0.0, (100, Share(1))),
        ([Node(8, 1)], 0, 0, 1.0, (1, Share(7, 1.0))),
        ([Node(8, 1)], 0, 0, 0.25, (4, Share(1, 0.25))),
        ([Node(16, 2), Node(64)], 0, 0, 0.5, (4, Share(4, 0.5))),
        ([Node(16, 4), Node(16, 4)], 0, 0, 2.0, (4, Share(7, 2.0))),
        ([Node(16, 2)], 0, 0, 0.4, (4, Share(3, 0.4))),
    ],
)
def test_layout(nodes: list[Node], least: int, most: int, gpus: float, expected: tuple[int, Share]) -> None:
    assert layout(nodes, least, most, gpus) == expected


@given(
    st.lists(st.builds(Node, st.integers(1, 64), st.integers(0, 8).map(float)), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
)
def test_what_is_laid_out_fits(nodes: list[Node], gpus: float) -> None:
    actors, share = layout(nodes, gpus=gpus)
    assert share.gpus == gpus and share.cpus >= 1
    if not gpus:
        assert places(nodes, share) >= actors >= 1
    used = places(nodes, share)
    assert used * share.cpus <= max(sum(n.cpus for n in nodes) - 1, len(nodes))
    assert used * gpus <= sum(n.gpus for n in nodes)
    more = [*nodes, Node(64, 8)]
    assert places(more, share) >= places(nodes, share)


def test_bounds() -> None:
    assert [within(n, 2, 4) for n in (0, 2, 3, 9)] == [2, 2, 3, 4]
    assert within(9, 1, 0) == 9


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"actors": 2, "max_actors": 3}, "give either it or them"),
        ({"min_actors": 3, "max_actors": 2}, "max_actors is 2, less than min_actors, 3"),
        ({"gpus_per_actor": 1.5}, "a fraction below 1, or a whole number"),
        ({"hang_s": 0}, "engine.hang_s = 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(RunOptions, {"engine": settings}, "options")


def test_settings_that_fit() -> None:
    assert EngineConfig(min_actors=2, max_actors=2, gpus_per_actor=0.5).actors == 0
    assert EngineConfig(gpus_per_actor=2).gpus_per_actor == 2.0


# -- activity --------------------------------------------------------------------------------------------------------


def test_what_a_shard_did_last() -> None:
    now = [0.0]
    activity = Activity(NullJournal(), lambda: now[0])
    with activity.of(1):
        now[0] = 5.0
        with activity.of(2):
            assert activity.idle_s() == {1: 5.0, 2: 0.0}
            activity.note("codec-0", 1, ["a"])
            now[0] = 8.0
            assert activity.idle_s() == {1: 3.0, 2: 3.0}
            activity.clear("codec-0")
            assert activity.idle_s() == {1: 0.0, 2: 3.0}
            activity.note("codec-0", 2, ["b"])
            now[0] = 9.0
        assert activity.idle_s() == {1: 1.0}
        activity.clear("codec-0")  # of a shard that failed meanwhile
    assert activity.idle_s() == {}


def test_notes_reach_the_journal(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    activity = Activity(FileJournal(path, 2))
    with activity.of(7):
        activity.note("codec-0", 7, ["a", "b"])
        activity.note("codec-1", 7, ["c"])
        activity.clear("codec-1")
    assert read(path) == [(7, "a"), (7, "b")]
