"""What stands between a verb and its run: splits of one's own, strictness, dry runs, groups that stay together."""

import shutil
import zipfile
from collections import Counter
from pathlib import Path

import generators
import numpy as np
import pytest

import segbatch
from segbatch import api, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import BadItemsError, ConfigError
from segbatch.jobs import Limits, Resplit
from segbatch.planning import cut
from segbatch.records import PlanItem

INLINE = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=2))


def item(name: str, group: str = "", rows: int = 1) -> PlanItem:
    return PlanItem(name, f"/x/{name}", "e", 10, rows=rows, group_id=group)


class TestResplit:
    def test_shares_are_about_right_and_hold_when_data_are_added(self) -> None:
        resplit = Resplit("sample_id", (0.8, 0.1, 0.1))
        before = {f"s{i}": resplit.split_of(item(f"s{i}")) for i in range(4000)}
        counts = Counter(before.values())
        assert abs(counts["train"] - 3200) < 120 and abs(counts["val"] - 400) < 80 and abs(counts["test"] - 400) < 80
        assert all(resplit.split_of(item(s)) == split for s, split in before.items())

    def test_a_group_lies_in_one_split_and_loners_stand_for_themselves(self) -> None:
        resplit = Resplit("group_id", (0.5, 0.5))
        by_group = {g: {resplit.split_of(item(f"{g}{i}", g)) for i in range(20)} for g in "abcdefgh"}
        assert all(len(splits) == 1 for splits in by_group.values())
        assert set().union(*by_group.values()) == {"train", "val"}
        assert len({resplit.split_of(item(f"lone{i}")) for i in range(20)}) == 2

    @pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.6), (0.2, 0.2, 0.3, 0.3), (1.2, -0.2)])
    def test_wrong_fractions_are_refused(self, fractions: tuple[float, ...]) -> None:
        with pytest.raises(ConfigError, match="add up to 1"):
            Resplit("group_id", fractions)

    def test_ingest_writes_them_and_another_choice_needs_another_output(self, tmp_path: Path) -> None:
        tree, out = generators.camvid(tmp_path / "tree", frames=6), str(tmp_path / "out")
        segbatch.ingest("camvid", str(tree), out, resplit=Resplit("group_id", (0.5, 0.5)), options=INLINE)
        rows = api.query(out, "SELECT group_id, count(DISTINCT split) AS n FROM samples GROUP BY 1").to_pylist()
        assert len(rows) == 2 and all(r["n"] == 1 for r in rows)
        with pytest.raises(ConfigError, match="fractions"):
            segbatch.ingest("camvid", str(tree), out, resplit=Resplit("group_id", (0.9, 0.1)), options=INLINE)


class TestChanges:
    def test_a_dry_run_counts_what_is_new_changed_and_gone(self, tmp_path: Path) -> None:
        tree, out = generators.image_masks(tmp_path / "tree"), str(tmp_path / "out")
        assert api.preview_ingest("image-masks", str(tree), out, options=INLINE).rows == 6
        segbatch.ingest("image-masks", str(tree), out, options=INLINE)
        written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "samples").iterdir()}
        generators.save(tree / "masks" / "train" / "item_0.png", np.full((12, 16), 3, np.uint16))
        (tree / "images" / "val" / "item_2.png").unlink()
        (tree / "masks" / "val" / "item_2.png").unlink()
        generators.save(tree / "images" / "val" / "item_9.png", generators.photo(9))
        generators.save(tree / "masks" / "val" / "item_9.png", generators.labels(9, (0, 3)))
        preview = api.preview_ingest("image-masks", str(tree), out, options=INLINE)
        assert (preview.rows, preview.changed, preview.gone, preview.rewrites) == (1, 1, 1, 2)
        result = segbatch.ingest("image-masks", str(tree), out, options=INLINE)
        rows = api.query(out, "SELECT sample_id, len(class_pixels) AS n FROM samples ORDER BY 1").to_pylist()
        assert result.rows == 4 and [r["sample_id"] for r in rows] == [
            "train/item_0", "train/item_1", "train/item_2", "val/item_0", "val/item_1", "val/item_9",
        ]  # fmt: skip
        assert rows[0]["n"] == 1
        kept = {p.name for p in (tmp_path / "out" / "samples").iterdir() if written.get(p.name) == p.stat().st_mtime_ns}
        assert len(kept) == 1  # shards of which nothing changed are not touched
        assert segbatch.ingest("image-masks", str(tree), out, options=INLINE).rows == 0

    def test_a_frame_that_moves_to_another_split_is_a_change(self, tmp_path: Path) -> None:
        tree, out = generators.camvid(tmp_path / "tree"), str(tmp_path / "out")
        segbatch.ingest("camvid", str(tree), out, options=INLINE)
        lines = (tree / "train.txt").read_text().splitlines()
        for folder in ("", "annot"):
            name = lines[0].split()[0].rsplit("/", 1)[1]
            (tree / f"train{folder}" / name).rename(tree / f"val{folder}" / name)
        (tree / "train.txt").write_text("\n".join(lines[1:]) + "\n")
        with (tree / "val.txt").open("a") as val:
            val.write(lines[0].replace("train", "val") + "\n")
        segbatch.ingest("camvid", str(tree), out, options=INLINE)
        rows = api.query(out, "SELECT split, count(*) AS n FROM samples GROUP BY 1 ORDER BY 1").to_pylist()
        assert rows == [{"split": "train", "n": 2}, {"split": "val", "n": 4}]

    def test_an_item_that_is_to_be_read_otherwise_has_changed(self, tmp_path: Path) -> None:
        tree, out = generators.camvid(tmp_path / "tree"), str(tmp_path / "out")
        for folder in ("trainannot", "valannot"):
            zipped = tmp_path / "packed" / f"{folder}.zip"
            zipped.parent.mkdir(exist_ok=True)
            with zipfile.ZipFile(zipped, "w") as archive:
                for path in sorted((tree / folder).iterdir()):
                    archive.write(path, f"{folder}/{path.name}")
            shutil.rmtree(tree / folder)
        for path in (tmp_path / "packed").iterdir():
            path.rename(tree / path.name)
        segbatch.ingest("camvid", str(tree), out, options=INLINE)
        (tree / "valannot.zip").rename(tree / "labels.zip")  # its members are as they were
        assert api.preview_ingest("camvid", str(tree), out, options=INLINE).changed == 3
        assert segbatch.ingest("camvid", str(tree), out, options=INLINE).state.bad == 0

    def test_new_classes_reach_the_class_table(self, tmp_path: Path) -> None:
        tree, out = generators.image_masks(tmp_path / "tree"), str(tmp_path / "out")
        segbatch.ingest("image-masks", str(tree), out, options=INLINE)
        with (tree / "classes.toml").open("a") as classes:
            classes.write('[[classes]]\nid = 7\nname = "basket"\n')
        generators.save(tree / "masks" / "val" / "item_0.png", np.full((12, 16), 7, np.uint16))
        assert segbatch.ingest("image-masks", str(tree), out, options=INLINE).state.bad == 0
        assert [c.name for c in tables.class_table(out).classes][-1] == "basket"


class TestStrict:
    def test_the_first_bad_row_stops_it_with_its_reason(self, tmp_path: Path) -> None:
        tree = generators.camvid(tmp_path / "tree", frames=4)
        first = sorted((tree / "trainannot").iterdir())[0]
        generators.save(first, np.full((6, 8), 1, np.uint8))
        with pytest.raises(BadItemsError, match=r"size-mismatch in shard 0; first: .*6.*--strict"):
            segbatch.ingest("camvid", str(tree), str(tmp_path / "out"), limits=Limits(1.0, strict=True), options=INLINE)


class TestGroups:
    def test_neighbours_of_a_group_share_a_shard(self) -> None:
        items = [item(f"{g}{i}", g) for g, n in (("a", 3), ("b", 1), ("c", 5), ("d", 1), ("e", 1)) for i in range(n)]
        shards = [[i.sample_id for i in piece.items] for piece in cut(items, PlanConfig(shard_rows=4), 0, grouped=True)]
        assert shards == [["a0", "a1", "a2", "b0"], ["c0", "c1", "c2", "c3", "c4"], ["d0", "e0"]]
        loose = [len(piece.items) for piece in cut(items, PlanConfig(shard_rows=4), 0)]
        assert loose == [4, 4, 3]

    def test_a_group_of_more_than_half_a_gigabyte_is_cut_all_the_same(self) -> None:
        video = [PlanItem(f"f{i}", f"/x/f{i}", "e", 100 << 20, group_id="v") for i in range(12)]
        assert [len(piece.items) for piece in cut(video, PlanConfig(), 0, grouped=True)] == [5, 5, 2]

    def test_a_volume_is_one_item_and_never_cut(self) -> None:
        items = [item("v0", "v0", 3), item("v1", "v1", 9), item("v2", "v2", 2), item("v3", "v3", 2)]
        shards = [[i.sample_id for i in piece.items] for piece in cut(items, PlanConfig(shard_rows=5), 0, grouped=True)]
        assert shards == [["v0"], ["v1"], ["v2", "v3"]]
