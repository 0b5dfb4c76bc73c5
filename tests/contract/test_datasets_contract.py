"""What every registered dataset must do, on a small tree of its own layout."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from generators import TREES

from segbatch.codecs import photo
from segbatch.datasets.base import Dataset
from segbatch.datasets.registry import DATASETS, dataset
from segbatch.errors import ConfigError
from segbatch.records import PlanItem


@pytest.fixture(params=sorted(DATASETS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Dataset, str]:
    name = str(request.param)
    return DATASETS[name], str(TREES[name](tmp_path / "tree"))


def listed(case: tuple[Dataset, str]) -> list[PlanItem]:
    found, source = case
    return list(found.items(source, ()))


def test_the_registry_knows_it_by_its_own_name(case: tuple[Dataset, str]) -> None:
    assert dataset(case[0].name) is case[0]


def test_it_recognises_its_own_layout_and_auto_finds_it(case: tuple[Dataset, str], tmp_path: Path) -> None:
    found, source = case
    assert found.recognises(source)
    assert dataset("auto", source) is found
    (tmp_path / "empty").mkdir()
    assert not found.recognises(str(tmp_path / "empty"))
    assert not found.recognises(str(tmp_path / "absent"))


def test_no_other_specific_dataset_recognises_it(case: tuple[Dataset, str]) -> None:
    found, source = case
    others = [d for d in DATASETS.values() if d is not found and d.name != "images"]
    assert not [d.name for d in others if d.recognises(source)]


def test_items_are_stable_unique_and_tagged(case: tuple[Dataset, str]) -> None:
    first = listed(case)
    assert first and first == listed(case)
    assert len({i.sample_id for i in first}) == len(first) == len({i.uri for i in first})
    assert all(i.etag and i.bytes > 0 and i.rows == 1 and i.row_start == 0 for i in first)


def test_the_splits_partition_the_items(case: tuple[Dataset, str]) -> None:
    found, source = case
    splits = found.splits(source)
    by_split = [list(found.items(source, (s,))) for s in splits]
    if splits:
        assert [i for part in by_split for i in part] == listed(case)
    assert all(found.read(i).split == s for s, part in zip(splits, by_split, strict=True) for i in part)


def test_an_unknown_split_is_refused_by_name(case: tuple[Dataset, str]) -> None:
    with pytest.raises(ConfigError, match="no split 'nightly'"):
        list(case[0].items(case[1], ("nightly",)))


def test_an_absent_root_is_refused_before_work(case: tuple[Dataset, str]) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        list(case[0].items(f"{case[1]}/nowhere", ()))


def test_a_changed_byte_changes_the_tag(case: tuple[Dataset, str]) -> None:
    before = listed(case)
    path = Path(before[0].uri)
    path.write_bytes(path.read_bytes() + b"\0")
    after = listed(case)
    assert before[0].etag != after[0].etag and before[1:] == after[1:]


def test_read_keeps_the_bytes_and_fits_the_label_map(case: tuple[Dataset, str]) -> None:
    found, source = case
    known = {c.label_id for c in found.classes(source).classes}
    for item in listed(case):
        sample = found.read(pickle.loads(pickle.dumps(item)))
        rgb, header = photo.decode(sample.image, item.uri)
        assert sample.image == Path(item.uri).read_bytes()
        assert (sample.sample_id, sample.image_uri) == (item.sample_id, item.uri)
        assert (sample.height, sample.width) == rgb.shape[:2] and sample.image_format == header.format
        assert (sample.semantic is not None) == ("semantic" in found.tasks)
        if sample.semantic is not None:
            assert sample.semantic.shape == (sample.height, sample.width) and sample.semantic.dtype == np.uint16
            assert set(np.unique(sample.semantic).tolist()) <= known


def test_classes_have_ids_and_names_of_their_own(case: tuple[Dataset, str]) -> None:
    classes = case[0].classes(case[1])
    assert len({c.label_id for c in classes.classes}) == len(classes.classes) == len({c.name for c in classes.classes})
    assert type(classes).from_json(classes.to_json()) == classes
