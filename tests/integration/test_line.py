"""The line on real input, through the command line: CamVid, and real pretrained weights on real photos."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segbatch import api, cli, tables
from segbatch.codecs import runlength
from segbatch.codecs.columns import runs_at

Shared = Callable[[str], Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints on stdout."""
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def rows_of(root: Path, table: str, columns: list[str]) -> list[dict[str, Any]]:
    """All rows of a table."""
    return [r for b in tables.scan(str(root), table, columns) for r in b.to_pylist()]


def test_camvid_val_is_read_as_it_lies_there(
    shared_data: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared_data("data/camvid")
    run(capsys, "ingest", "camvid", source, tmp_path / "camvid", "--split", "val")
    rows = rows_of(tmp_path / "camvid", "samples", ["sample_id", "image", "height", "width", "semantic", "status"])
    assert len(rows) == 101
    for row in rows:
        assert row["status"] == "ok"
        assert row["image"] == (source / "val" / f"{row['sample_id']}.png").read_bytes()
        label = np.asarray(Image.open(source / "valannot" / f"{row['sample_id']}.png"))
        values, lengths = zip(*((r["value"], r["length"]) for r in row["semantic"]), strict=True)
        assert np.array_equal(np.repeat(values, lengths).reshape(row["height"], row["width"]), label)
    classes = tables.class_table(str(tmp_path / "camvid"))
    assert [c.label_id for c in classes.classes] == list(range(12))
    assert classes.ignore_ids == (11,)
    assert (classes.classes[0].name, classes.classes[0].color) == ("Sky", (128, 128, 128))


@pytest.mark.ray
def test_pretrained_deeplab_on_a_folder_of_photos(
    shared_data: Shared, ray_session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert", reason="the extra litert is not installed")
    weights, photos = shared_data("weights/coral_deeplab"), tmp_path / "photos"
    shutil.copytree(shared_data("data/coco_tiny/train2017"), photos)
    shutil.copy(weights / "bird_segmentation.bmp", photos)
    model = f"litert:{weights / 'deeplabv3_mnv2_pascal_quant.tflite'}"
    printed = run(capsys, "predict", model, photos, tmp_path / "coco", "--json")
    assert json.loads(printed)["rows_done"] == 51
    columns = ["sample_id", "height", "width", "status"]
    rows = rows_of(tmp_path / "coco", "masks", columns)
    assert {r["sample_id"] for r in rows} == {p.name for p in photos.iterdir()}
    for row in rows:
        assert row["status"] == "ok"
        assert (row["width"], row["height"]) == Image.open(photos / row["sample_id"]).size
    bird = _mask(tmp_path / "coco", "bird_segmentation.bmp") == 3
    truth = np.asarray(Image.open(weights / "bird_segmentation_mask.bmp").convert("RGB")).any(-1)
    assert (bird & truth).sum() / (bird | truth).sum() > 0.88
    assert tables.class_table(str(tmp_path / "coco")).name_of(3) == "bird"


def _mask(root: Path, sample_id: str) -> np.ndarray:
    for batch in tables.scan(str(root), "masks", ["sample_id", "height", "width", "semantic"]):
        for i, row in enumerate(batch.select(["sample_id", "height", "width"]).to_pylist()):
            runs = runs_at(batch.column("semantic"), i)
            if row["sample_id"] == sample_id and runs is not None:
                return runlength.decode(runs, (row["height"], row["width"]))
    raise AssertionError(f"no mask of {sample_id}")


def test_camvid_through_a_pipeline_file(
    shared_data: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text(
        f'out = "{tmp_path}/out"\n[ingest]\ndataset = "camvid"\nsource = "{shared_data("data/camvid")}"\n'
        '[train]\nsplit = "train"\n[train.model]\nkind = "color"\n[predict]\nwhere = "split = \'val\'"\n'
        '[evaluate]\nprotocol = "camvid"\n[report]\nworst = 3\n[engine]\nkind = "inline"\n'
    )
    first = json.loads(run(capsys, "run", config, "--json"))
    again = json.loads(run(capsys, "run", config, "--json"))
    assert (first["rows_done"], first["rows_now"], again["rows_now"]) == (101, 101, 0)
    assert first["figures"] == again["figures"]
    miou = next(f["value"] for f in first["figures"] if f["metric"] == "miou" and not f["class"])
    assert 0.15 < miou < 0.25  # what colour alone can tell
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200].lower()
    summary = api.query(f"{tmp_path}/out/metrics", "SELECT value FROM summary WHERE metric = 'miou' AND class = ''")
    assert summary.to_pylist() == [{"value": miou}]


@pytest.mark.slow
@pytest.mark.ray
def test_a_pretrained_encoder_reaches_half_miou_on_camvid(
    shared_data: Shared, ray_session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 20 CPU minutes."""
    pytest.importorskip("timm", reason="the extra pretrained is not installed")
    source = shared_data("data/camvid")
    for split in ("train", "val"):
        run(capsys, "ingest", "camvid", source, tmp_path / split, "--split", split)
    config = tmp_path / "unet.toml"
    config.write_text(
        f'samples = "{tmp_path}/train"\n[model]\nkind = "unet"\nencoder = "efficientnet_lite0"\n'
        "decoder = [128, 64, 48, 32]\ninput_size = [256, 352]\n[data]\ncrop = [224, 288]\n"
        "[optim]\nmax_minutes = 18.5\nbatch_size = 8\nema = 0.995\n"
    )
    run(capsys, "train", config, tmp_path / "unet")
    run(capsys, "predict", f"unet@{tmp_path}/unet", tmp_path / "val", tmp_path / "masks")
    command = ("evaluate", tmp_path / "masks", tmp_path / "val", tmp_path / "metrics", "--protocol", "camvid", "--json")
    figures = json.loads(run(capsys, *command))["figures"]
    assert next(f["value"] for f in figures if f["metric"] == "miou" and not f["class"]) > 0.5
