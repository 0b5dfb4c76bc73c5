"""What every registered dataset must do, on a small tree of its own layout."""

import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from generators import TREES

from segbatch.codecs import photo, rle
from segbatch.config import PlanConfig
from segbatch.datasets import registry
from segbatch.datasets.base import Dataset
from segbatch.datasets.registry import BUILT_IN, dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError
from segbatch.planning import cut
from segbatch.records import PlanItem, Sample

Case = tuple[Dataset, Tree]


@pytest.fixture(params=sorted(BUILT_IN))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    name = str(request.param)
    return dataset(name), Tree.of(str(TREES[name](tmp_path / "tree")))


def listed(case: Case) -> list[PlanItem]:
    found, tree = case
    return list(found.items(tree, ()))


def samples(found: Dataset, tree: Tree) -> list[Sample]:
    return [s for item in found.items(tree, ()) for s in found.read(item)]


def test_every_dataset_has_a_tree_of_its_own() -> None:
    assert set(TREES) == set(BUILT_IN)


def test_the_registry_knows_it_by_its_own_name(case: Case) -> None:
    assert dataset(case[0].name) is case[0]
    assert registry.find(case[0].name, case[1].source) == case


def test_it_recognises_its_own_layout_and_nothing_else(case: Case, tmp_path: Path) -> None:
    found, tree = case
    assert found.recognises(tree)
    (tmp_path / "empty").mkdir()
    assert not found.recognises(Tree.of(str(tmp_path / "empty")))
    assert not found.recognises(Tree.of(str(tmp_path / "absent")))


def test_auto_finds_it_or_names_it_among_those_that_share_its_files(case: Case) -> None:
    found, tree = case
    sharing = [n for n in BUILT_IN if n != "images" and dataset(n).recognises(tree)]
    if len(sharing) <= 1:
        assert registry.find("auto", tree.source)[0] is found
        return
    with pytest.raises(ConfigError, match="looks like") as caught:
        registry.find("auto", tree.source)
    assert found.name in caught.value.problem.split()


def test_items_are_stable_unique_and_tagged(case: Case) -> None:
    first = listed(case)
    assert first and first == listed(case)
    assert len({i.sample_id for i in first}) == len(first) == len({i.uri for i in first})
    assert all(i.etag and i.bytes > 0 and i.rows >= 1 and i.row_start == 0 for i in first)


def test_the_splits_partition_the_items(case: Case) -> None:
    found, tree = case
    splits = found.splits(tree)
    by_split = [list(found.items(tree, (s,))) for s in splits]
    if splits:
        assert [i for part in by_split for i in part] == listed(case)
    assert all(i.split == s for s, part in zip(splits, by_split, strict=True) for i in part)
    assert not found.official_splits or set(splits) <= set(found.official_splits)


def test_an_unknown_split_is_refused_by_name(case: Case) -> None:
    with pytest.raises(ConfigError, match="no split 'nightly'"):
        list(case[0].items(case[1], ("nightly",)))


def test_an_absent_root_is_refused_before_work(case: Case) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        list(case[0].items(Tree.of(f"{case[1].source}/nowhere"), ()))


def test_a_changed_byte_changes_the_tag(case: Case) -> None:
    before = listed(case)
    path = Path(before[0].uri)
    path.write_bytes(path.read_bytes() + b"\0")
    after = listed(case)
    assert before[0].etag != after[0].etag and before[1:] == after[1:]


def test_groups_that_belong_together_are_neighbours_and_share_a_shard(case: Case) -> None:
    found, _ = case
    items = listed(case)
    shards = [{i.group_id for i in piece.items} for piece in cut(items, PlanConfig(shard_rows=1), 0, found.grouped)]
    if found.grouped:
        assert all(i.group_id for i in items)
        assert sum(len(groups) for groups in shards) == len({i.group_id for i in items})


def test_read_gives_the_planned_rows_and_keeps_the_photos_bytes(case: Case) -> None:
    found, _ = case
    for item in listed(case):
        rows = list(found.read(pickle.loads(pickle.dumps(item))))
        assert [s.sample_id for s in rows] == [item.row_id(i) for i in range(item.rows)]
        assert all(s.image_uri == item.uri and s.image_format for s in rows)
        if rows[0].volume is None:
            rgb, header = photo.decode(rows[0].image, item.uri)
            assert rows[0].image == Path(item.uri).read_bytes()
            assert (rows[0].height, rows[0].width) == rgb.shape[:2] and rows[0].image_format == header.format


def test_label_maps_lie_on_the_grid_with_known_ids(case: Case) -> None:
    found, tree = case
    known = {c.label_id for c in found.classes(tree).classes}
    seen = False
    for sample in samples(found, tree):
        if sample.semantic is not None:
            seen = True
            assert sample.semantic.shape == (sample.height, sample.width)
            assert sample.semantic.dtype in (np.uint8, np.uint16)
            assert set(np.unique(sample.semantic).tolist()) <= known
    assert seen == ("semantic" in found.tasks)


def test_instances_are_masks_of_known_classes_with_ids_of_their_own(case: Case) -> None:
    found, tree = case
    known = {c.label_id for c in found.classes(tree).classes}
    seen = False
    for sample in samples(found, tree):
        instances = sample.instances or ()
        seen = seen or bool(instances)
        assert len({i.id for i in instances}) == len(instances) and all(i.id > 0 for i in instances)
        for instance in instances:
            assert instance.category_id in known and instance.score is None
            assert rle.decode(instance.counts, sample.height, sample.width).shape == (sample.height, sample.width)
    assert seen == ("instance" in found.tasks)


def test_panoptic_maps_index_their_segments(case: Case) -> None:
    found, tree = case
    known = {c.label_id for c in found.classes(tree).classes}
    seen = False
    for sample in samples(found, tree):
        assert (sample.panoptic is None) == (sample.segments is None)
        if sample.panoptic is not None and sample.segments is not None:
            seen = True
            assert sample.panoptic.dtype in (np.uint8, np.uint16)
            assert sample.panoptic.max(initial=0) <= len(sample.segments)
            assert {s.category_id for s in sample.segments} <= known
            assert len({s.id for s in sample.segments}) == len(sample.segments)
    assert seen == ("panoptic" in found.tasks)


def test_classes_have_ids_and_names_of_their_own(case: Case) -> None:
    classes = case[0].classes(case[1])
    assert len({c.label_id for c in classes.classes}) == len(classes.classes) == len({c.name for c in classes.classes})
    assert type(classes).from_json(classes.to_json()) == classes


def zipped(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder.parent))


def tarred(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as out:
        out.add(folder, folder.name)


@pytest.mark.parametrize(("suffix", "pack"), [(".zip", zipped), (".tar.gz", tarred)])
def test_it_reads_the_same_from_an_archive(case: Case, suffix: str, pack: Callable[[Path, Path], None]) -> None:
    found, tree = case
    archive = Path(tree.source).with_name(f"download{suffix}")
    pack(Path(tree.source), archive)
    again, packed = registry.find(found.name, str(archive))
    plain, other = samples(found, tree), samples(again, packed)
    assert [s.sample_id.removeprefix("tree/") for s in other] == [s.sample_id for s in plain]
    for mine, theirs in zip(plain, other, strict=True):
        assert theirs.image == mine.image and theirs.image_uri.startswith(str(archive))
        assert (theirs.instances, theirs.segments, theirs.attributes) == (
            mine.instances,
            mine.segments,
            mine.attributes,
        )
        for a, b in ((mine.semantic, theirs.semantic), (mine.panoptic, theirs.panoptic)):
            assert (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
