"""Plans: how a listing is cut, what a later plan changes, and that nobody's plan is half there."""

import functools
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbatch import planning
from segbatch.config import PlanConfig
from segbatch.errors import ConfigError, StorageError
from segbatch.planning import cut, items_of, latest_shards, preview, publish, published
from segbatch.records import PlanItem, ShardRef


def image(i: int, etag: str = "1", size: int = 10) -> PlanItem:
    return PlanItem(f"{i}.jpg", f"/in/{i}.jpg", etag, size)


def part(i: int, rows: int, etag: str = "1") -> PlanItem:
    return PlanItem("", f"/samples/part-{i}.parquet", etag, rows * 100, rows)


def plan(root: Path, items: list[PlanItem], shard_rows: int = 4, complete: bool = True) -> planning.PlanInfo | None:
    return publish(str(root), "masks", lambda: items, PlanConfig(shard_rows=shard_rows), complete)


def shards(root: Path) -> dict[int, ShardRef]:
    found = list(latest_shards(str(root), "masks", published(str(root))))
    assert len({s.number for s in found}) == len(found) == len({s.key for s in found})
    return {s.number: s for s in found}


def planned(root: Path) -> list[tuple[int, str, str]]:
    """(shard, sample id, etag) of everything that counts."""
    return sorted((n, i.sample_id, i.etag) for n, s in shards(root).items() for i in items_of(s))


# -- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (PlanConfig(shard_rows=4), [4, 4, 2]),
        (PlanConfig(shard_rows=100), [10]),
        (PlanConfig(shard_bytes=30), [3, 3, 3, 1]),
        (PlanConfig(shard_bytes=5), [1] * 10),
        (PlanConfig(), [10]),
    ],
)
def test_cut_images(options: PlanConfig, sizes: list[int]) -> None:
    pieces = list(cut([image(i) for i in range(10)], options, 7))
    assert [len(p.items) for p in pieces] == sizes
    assert [p.number for p in pieces] == list(range(7, 7 + len(sizes)))
    assert [i.sample_id for p in pieces for i in p.items] == [f"{i}.jpg" for i in range(10)]


@pytest.mark.parametrize(("count", "shards", "largest"), [(1, 1, 1), (200, 13, 16), (2000, 16, 125), (9000, 36, 256)])
def test_small_inputs_are_spread(count: int, shards: int, largest: int) -> None:
    sizes = [len(p.items) for p in cut((image(i) for i in range(count)), PlanConfig(), 0)]
    assert (len(sizes), max(sizes), sum(sizes)) == (shards, largest, count)


def test_cut_ranges_of_parquet_files() -> None:
    pieces = list(cut([part(0, 10), part(1, 3), part(2, 4)], PlanConfig(shard_rows=4), 0))
    ranges = [[(i.uri[9:15], i.row_start, i.rows) for i in p.items] for p in pieces]
    assert ranges == [
        [("part-0", 0, 4)],
        [("part-0", 4, 4)],
        [("part-0", 8, 2)],
        [("part-1", 0, 3)],
        [("part-2", 0, 4)],
    ]


def test_cut_is_a_stream() -> None:
    taken = 0

    def endless() -> Iterator[PlanItem]:
        nonlocal taken
        while True:
            taken += 1
            yield image(taken)

    assert len(next(cut(endless(), PlanConfig(), 0)).items) == 256
    assert taken < 5000


# -- publishing ------------------------------------------------------------------------------------------------------


def test_publish_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PART_ROWS", 6)
    monkeypatch.setattr(planning, "_GROUP_ROWS", 4)
    info = plan(tmp_path, [image(i) for i in range(20)])
    assert info is not None
    assert (info.plan, info.shards, info.rows, info.bytes, info.next_shard, info.rewrites) == (0, 5, 20, 200, 5, ())
    assert published(str(tmp_path)) == [info]
    found = shards(tmp_path)
    assert len({s.part for s in found.values()}) == 5  # a shard never spans two files
    assert planned(tmp_path) == sorted((i // 4, f"{i}.jpg", "1") for i in range(20))
    assert [s.uri for s in found.values()] == [f"{tmp_path}/masks/{s.key}" for s in found.values()]


def test_nothing_to_plan(tmp_path: Path) -> None:
    assert plan(tmp_path, []) is None
    assert published(str(tmp_path)) == []
    assert plan(tmp_path, [image(0)]) is not None
    assert plan(tmp_path, [image(0)]) is None
    assert len(published(str(tmp_path))) == 1
    assert len(list((tmp_path / ".segbatch" / "plans").iterdir())) == 2


def test_listing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PART_ROWS", 1000)

    def listing() -> Iterator[PlanItem]:
        yield from (image(i) for i in range(4500))
        raise ConfigError("the listing broke off")

    with pytest.raises(ConfigError, match="broke off"):
        publish(str(tmp_path), "masks", listing, PlanConfig(shard_rows=500))
    assert list((tmp_path / ".segbatch" / "plans").iterdir()) == []


def test_racing_drivers_share_one_plan(tmp_path: Path) -> None:
    """Each lists what is there when it looks; whoever is late plans the rest."""
    found: list[planning.PlanInfo | None] = []

    def work(i: int) -> None:
        found.append(plan(tmp_path, [image(k) for k in range(10 + i)], complete=False))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [info for info in found if info is not None]
    assert sorted(i.plan for i in won) == list(range(len(won)))
    assert sorted(sample for _, sample, _ in planned(tmp_path)) == sorted(f"{k}.jpg" for k in range(15))
    assert len(list((tmp_path / ".segbatch" / "plans").iterdir())) == 2 * len(won)  # losers leave nothing


@pytest.mark.parametrize("held", [7, 100])
def test_ids_that_occur_twice_are_found_beyond_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """With 7 ids held, the hashes of the others lie on the disk in sorted runs."""
    monkeypatch.setattr(planning, "_RUN_IDS", held)
    monkeypatch.setattr(planning, "_GROUP_ROWS", 5)
    items = [image(i) for i in range(60)]
    assert plan(tmp_path / "good", items) is not None
    twice = [PlanItem(f"{i}.jpg", f"/other/{i}.jpg", "1", 10) for i in (3, 41)]
    with pytest.raises(ConfigError, match=r"2 sample ids occur twice, for example 3\.jpg, 41\.jpg"):
        plan(tmp_path / "bad", items + twice)
    assert list((tmp_path / "bad" / ".segbatch" / "plans").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_scratch_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_RUN_IDS", 7)
    monkeypatch.setattr("tempfile.TemporaryFile", functools.partial(open, "/dev/full", "wb"))
    with pytest.raises(StorageError, match=r"no space left for temporary files in .* set TMPDIR"):
        plan(tmp_path, [image(i) for i in range(60)])
    assert list(tmp_path.rglob("plans/*")) == []


# -- changes ---------------------------------------------------------------------------------------------------------


def test_changed_vanished_new(tmp_path: Path) -> None:
    plan(tmp_path, [image(i) for i in range(12)])
    first = shards(tmp_path)
    now = [image(i, "2" if i == 1 else "1") for i in range(14) if i != 6]
    assert preview(str(tmp_path), lambda: now, PlanConfig(shard_rows=4)) == planning.Preview(1, 2, 20, 2, 12, 1, 1)
    info = plan(tmp_path, now)
    assert info is not None and (info.rewrites, info.next_shard, info.rows) == ((0, 1), 4, 9)
    second = shards(tmp_path)
    assert [(n, s.plan, s.mode) for n, s in sorted(second.items())] == [
        (0, 1, "rewrite"),
        (1, 1, "rewrite"),
        (2, 0, "create"),
        (3, 1, "create"),
    ]
    assert all(second[n].key == first[n].key for n in first)
    assert {(s, e) for _, s, e in planned(tmp_path)} == {(i.sample_id, i.etag) for i in now}
    assert plan(tmp_path, now) is None


def test_a_shard_that_lost_all_its_items(tmp_path: Path) -> None:
    plan(tmp_path, [image(i) for i in range(8)])
    left = [image(i) for i in range(4, 8)]
    info = plan(tmp_path, left)
    assert info is not None and (info.rewrites, info.rows) == ((0,), 0)
    assert plan(tmp_path, left) is None
    info = plan(tmp_path, [image(i) for i in range(8)])  # they come back, as new ones
    assert info is not None and (info.rewrites, info.next_shard) == ((), 3)
    assert len(planned(tmp_path)) == 8


def test_incomplete_listing_does_not_remove(tmp_path: Path) -> None:
    plan(tmp_path, [image(i) for i in range(8)])
    assert plan(tmp_path, [image(0)], complete=False) is None
    info = plan(tmp_path, [image(0, "2")], complete=False)
    assert info is not None and info.rewrites == (0,)
    # the rest of the shard is not in the listing, so it cannot be planned anew
    assert {s for n, s, _ in planned(tmp_path) if n == 1} == {f"{i}.jpg" for i in range(4, 8)}


def test_ids_stay_unique_over_plans(tmp_path: Path) -> None:
    plan(tmp_path, [PlanItem("x.jpg", "/a/x.jpg", "1", 1)])
    now = [PlanItem("a/x.jpg", "/a/x.jpg", "1", 1), PlanItem("x.jpg", "/x.jpg", "1", 1)]
    plan(tmp_path, now)
    assert [s for _, s, _ in planned(tmp_path)] == ["a/x.jpg", "x.jpg"]
    with pytest.raises(ConfigError, match=r"1 sample ids occur twice, for example x\.jpg"):
        plan(tmp_path, [PlanItem("x.jpg", "/y.jpg", "1", 1)], complete=False)


def test_growing_and_shrinking_parquet_file(tmp_path: Path) -> None:
    def ranges() -> list[tuple[int, str, int, int]]:
        found = shards(tmp_path).items()
        return sorted((n, i.etag, i.row_start, i.rows) for n, s in found for i in items_of(s))

    plan(tmp_path, [part(0, 10)])
    assert ranges() == [(0, "1", 0, 4), (1, "1", 4, 4), (2, "1", 8, 2)]
    plan(tmp_path, [part(0, 13, "2")])
    assert ranges() == [(0, "2", 0, 4), (1, "2", 4, 4), (2, "2", 8, 5)]
    plan(tmp_path, [part(0, 5, "3"), part(1, 2)])
    assert ranges() == [(0, "3", 0, 4), (1, "3", 4, 1), (3, "1", 0, 2)]
    assert shards(tmp_path)[2].rows == 0


def selection(chosen: dict[int, tuple[int, set[int]]]) -> list[PlanItem]:
    """File -> (version, selected rows), as a listing of runs of adjacent rows."""
    items = []
    for file, (version, rows) in sorted(chosen.items()):
        for _, run in itertools.groupby(enumerate(sorted(rows)), lambda pair: pair[1] - pair[0]):
            found = [row for _, row in run]
            share = 10 * len(found)
            items.append(PlanItem("", f"/s/part-{file}", str(version), share, len(found), found[0]))
    return items


def planned_rows(root: Path) -> list[tuple[str, str, int]]:
    """(file, version, row) of everything that counts, each as often as it is planned."""
    items = (i for s in shards(root).values() for i in items_of(s))
    return sorted((i.uri, i.etag, i.row_start + k) for i in items for k in range(i.rows))


def test_a_selection_of_another_version_stays_in_the_stretches_of_its_shards(tmp_path: Path) -> None:
    def ranges() -> list[tuple[int, str, int, int, int]]:
        found = shards(tmp_path).items()
        return sorted((n, i.etag, i.row_start, i.rows, i.bytes) for n, s in found for i in items_of(s))

    plan(tmp_path, selection({0: (1, {2, 3, 8, 9}), 1: (1, {5})}), shard_rows=2)
    assert ranges() == [(0, "1", 2, 2, 20), (1, "1", 8, 2, 20), (2, "1", 5, 1, 10)]
    now = selection({0: (2, {0, 6, 7, 8, 20}), 1: (1, {5})})
    info = plan(tmp_path, now, shard_rows=2)
    assert info is not None and (info.rewrites, info.rows, info.next_shard) == ((0, 1), 5, 3)
    assert ranges() == [(0, "2", 0, 1, 10), (0, "2", 6, 2, 20), (1, "2", 8, 1, 10), (1, "2", 20, 1, 10), ranges()[-1]]
    assert preview(str(tmp_path), lambda: now, PlanConfig()) == planning.Preview(0, 0, 0, 0, 6)
    plan(tmp_path, selection({0: (3, {1}), 1: (1, {5})}))
    assert (ranges()[0], shards(tmp_path)[1].rows) == ((0, "3", 1, 1, 10), 0)  # a shard may have lost all its rows
    plan(tmp_path, selection({0: (4, {1, 30}), 1: (1, {5})}))
    assert [r[:4] for r in ranges()] == [(0, "4", 1, 1), (0, "4", 30, 1), (2, "1", 5, 1)]
    plan(tmp_path, selection({1: (1, {5})}))
    plan(tmp_path, selection({0: (4, {1}), 1: (1, {5})}))  # none is selected, and then one is again
    assert planned_rows(tmp_path) == [("/s/part-0", "4", 1), ("/s/part-1", "1", 5)]


FILES = st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 15), min_size=1), max_size=3)


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(st.lists(FILES.filter(bool), min_size=2, max_size=4), st.integers(1, 5))
def test_every_selected_row_is_planned_exactly_once(steps: list[dict[int, set[int]]], shard_rows: int) -> None:
    versions: dict[int, tuple[int, set[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step, files in enumerate(steps):
            versions = {f: versions[f] if versions.get(f, (0, None))[1] == r else (step, r) for f, r in files.items()}
            plan(Path(folder), selection(versions), shard_rows)
            wanted = [(f"/s/part-{f}", str(version), row) for f, (version, rows) in versions.items() for row in rows]
            assert planned_rows(Path(folder)) == sorted(wanted)
            assert plan(Path(folder), selection(versions), shard_rows) is None
