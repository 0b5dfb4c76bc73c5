"""Selections of rows, odd folders and odd names: what a person meets who points segbatch at a lake."""

import os
from pathlib import Path

import doubles
import generators
import numpy as np
import photos
import pytest

from segbatch import api, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.datasets.images import IMAGE_SUFFIXES
from segbatch.errors import ConfigError, SchemaError, StorageError
from segbatch.jobs import Limits

INLINE = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=4))


def predict(source: Path, out: Path, where: str = "", limit: int = 0) -> int:
    """Rows in the masks table after a run of the free model."""
    model = doubles.FreeModel(str(out.parent / "log"))
    api.predict(model, str(source), str(out), where=where, limit=limit, options=INLINE, limits=Limits(1.0))
    return sum(b.num_rows for b in tables.scan(str(out), "masks", ["sample_id"]))


def count_photos(folder: Path) -> int:
    """Photos in a folder and below, hidden ones left out."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
    return sum(not any(part.startswith(".") for part in path.parts) for path in found)


def ingest(tree: Path, out: Path, shard_rows: int = 0) -> None:
    options = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=shard_rows))
    api.ingest("image-masks", str(tree), str(out), options=options)


WHERE = "regexp_matches(sample_id, '[02589]$')"


@pytest.mark.parametrize("shard_rows", [2, 100])
def test_a_selection_follows_a_table_that_changes(tmp_path: Path, shard_rows: int) -> None:
    """Every selected sample has one mask, and no image goes through the model that has not changed."""
    tree = generators.image_masks(tmp_path / "tree", count=10)
    (tree / "classes.toml").write_text(generators.CLASSES_TOML.replace("floor", "dark").replace("cart", "both"))
    samples, masks, log = tmp_path / "samples", tmp_path / "masks", tmp_path / "log"
    options = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=shard_rows))

    def night(out: Path = masks) -> tuple[int, set[str], dict[str, float | None]]:
        """Images through the model, masks, figures."""
        before = doubles.images_seen(log)
        ingest(tree, samples, 7)
        result = api.predict(doubles.FreeModel(str(log)), str(samples), str(out), where=WHERE, options=options)
        found = photos.rows(out)
        seen = doubles.images_seen(log) - before
        assert (result.rows, result.state.rows) == (seen, len(found))
        figures = api.evaluate(str(out), str(samples), f"{out}-metrics", missing="skip", options=options).figures
        return seen, set(found), {f"{f.metric} {f.class_name}": f.value for f in figures}

    chosen = {f"{split}/item_{i}" for split in ("train", "val") for i in (0, 2, 5, 8, 9)}
    assert night()[:2] == (10, chosen)
    generators.save(tree / "images" / "val" / "item_40.png", generators.photo(40))
    generators.save(tree / "masks" / "val" / "item_40.png", generators.labels(40, (0, 3)))
    chosen |= {"val/item_40"}
    assert night()[:2] == (1, chosen)
    os.utime(tree / "images" / "train" / "item_2.png", (1, 1))  # touched
    os.utime(tree / "images" / "train" / "item_3.png", (1, 1))  # touched, and not chosen
    assert night()[:2] == (1, chosen)
    generators.save(tree / "masks" / "val" / "item_8.png", generators.labels(77, (0, 3)))  # labelled again
    assert night()[:2] == (1, chosen)
    for folder in ("images", "masks"):
        (tree / folder / "train" / "item_1.png").unlink()  # not chosen: others move up
        (tree / folder / "val" / "item_9.png").unlink()
    chosen -= {"val/item_9"}
    seen, found, figures = night()
    across = 2 if shard_rows == 2 else 0  # rows that moved up to the shard before theirs
    assert found == chosen and seen <= across
    assert night() == (0, chosen, figures)
    assert night(tmp_path / "anew") == (len(chosen), chosen, figures)
    for i in (0, 2, 5, 8, 9):
        for folder in ("images", "masks"):
            (tree / folder / "train" / f"item_{i}.png").unlink()
    seen, found, _ = night()
    assert found == {i for i in chosen if i.startswith("val")} and seen <= across


def test_a_limit_is_chosen_once(tmp_path: Path) -> None:
    tree, samples, masks = generators.image_masks(tmp_path / "tree", count=6), tmp_path / "samples", tmp_path / "masks"
    generators.save(tree / "images" / "train" / "item_4.png", np.full_like(generators.photo(4), photos.MARKER))
    ingest(tree, samples)
    with pytest.raises(doubles.Stop):
        api.predict(doubles.StopLater(out=str(masks)), str(samples), str(masks), limit=8, options=INLINE)
    done = sum(b.num_rows for b in tables.scan(str(masks), "masks", ["sample_id"]))
    assert 0 < done < 8
    (tree / "images" / "train" / "item_0.png").unlink()
    (tree / "masks" / "train" / "item_0.png").unlink()
    ingest(tree, samples)
    with pytest.raises(ConfigError, match=r"samples/part-.* has changed since --limit chose rows of it .*new output"):
        predict(samples, masks, limit=8)
    with pytest.raises(ConfigError, match="has changed since --limit"):
        api.preview_predict(doubles.FreeModel(), str(samples), str(masks), limit=8, options=INLINE)
    assert predict(samples, tmp_path / "more", limit=8) == 8
    (tree / "images" / "train" / "item_1.png").unlink()
    (tree / "masks" / "train" / "item_1.png").unlink()
    ingest(tree, samples)
    assert predict(samples, tmp_path / "more", limit=8) == 8  # all were done
    planned = api.preview_predict(doubles.FreeModel(), str(samples), str(tmp_path / "more"), limit=8, options=INLINE)
    assert (planned.rows, planned.rewrites, planned.changed, planned.planned_rows) == (0, 0, 0, 8)


def test_limit_counts_images_of_a_table_and_of_a_folder(tmp_path: Path) -> None:
    tree = generators.image_masks(tmp_path / "tree", count=6)
    ingest(tree, tmp_path / "samples")
    assert predict(tmp_path / "samples", tmp_path / "a", limit=2) == 2
    assert predict(tmp_path / "samples", tmp_path / "a", limit=2) == 2
    photos = generators.images(tmp_path / "photos", count=5)
    assert predict(photos, tmp_path / "b", limit=3) == 3
    generators.save(photos / "0-sorts-first.png", generators.photo(7))
    assert predict(photos, tmp_path / "b", limit=3) == 3


def test_an_empty_selection_is_an_error_that_claims_nothing(tmp_path: Path) -> None:
    ingest(generators.image_masks(tmp_path / "tree"), tmp_path / "samples")
    with pytest.raises(ConfigError, match="no image that is selected"):
        predict(tmp_path / "samples", tmp_path / "masks", "split = 'vla'")
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("name", ["shard=3", "date=2024-01-01", "100%", "a#b", "[x]", "ö 漢"])
def test_outputs_below_odd_folders_take_new_photos_in(tmp_path: Path, name: str) -> None:
    photos = generators.images(tmp_path / "photos", count=5)
    before = predict(photos, tmp_path / name / "out")
    generators.save(photos / "new.png", generators.photo(7))
    assert predict(photos, tmp_path / name / "out") == before + 1


@pytest.mark.parametrize("name", ["samples", "photos/samples"])
def test_a_photo_folder_may_be_called_samples(tmp_path: Path, name: str) -> None:
    generators.images(tmp_path / name, count=3)
    source = tmp_path / name.split("/")[0]
    expected = count_photos(source)
    assert predict(source, tmp_path / "out") == expected > 0


def test_links_back_pipes_and_undecodable_names(tmp_path: Path) -> None:
    photos = generators.images(tmp_path / "photos", count=3)
    expected = count_photos(photos)
    (photos / "again").symlink_to(photos)
    os.mkfifo(photos / "pipe.jpg")
    assert predict(photos, tmp_path / "out") == expected
    with open(os.fsencode(photos) + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(StorageError, match="not UTF-8"):
        predict(photos, tmp_path / "out")


def test_a_cut_part_file_is_one_clear_line(tmp_path: Path) -> None:
    photos = generators.images(tmp_path / "photos", count=3)
    predict(photos, tmp_path / "out")
    part = next((tmp_path / "out" / "masks").iterdir())
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(SchemaError, match="delete it and run"):
        api.status(str(tmp_path / "out"))
    part.unlink()
    assert predict(photos, tmp_path / "out") > 0


def test_a_list_with_a_byte_order_mark_and_an_impossible_line(tmp_path: Path) -> None:
    photos = generators.images(tmp_path / "photos", count=3)
    first = sorted(p for p in photos.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")[0]
    (tmp_path / "list.txt").write_text(f"\ufeff{first}\n{first}/x.jpg\n")
    assert predict(tmp_path / "list.txt", tmp_path / "out") == 2
    status = {s for b in tables.scan(str(tmp_path / "out"), "masks", ["status"]) for s in b.column(0).to_pylist()}
    assert len(status) == 2
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        predict(tmp_path / "latin.txt", tmp_path / "out2")
