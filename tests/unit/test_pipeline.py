"""Pipelines: what a second night does when the data have changed, and what a file may say."""

import shutil
from pathlib import Path
from typing import Any

import generators
import pytest

from segbatch import api, pipeline, tables
from segbatch.config import parse
from segbatch.errors import ConfigError
from segbatch.jobs import Silent
from segbatch.models import checkpoint
from segbatch.pipeline import PipelineConfig

KEPT = "the samples have changed since {out}/model was trained; it is kept (to train anew, delete it and {out}/masks)"


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def config(tree: Path, out: Path, **changes: Any) -> PipelineConfig:
    document = {
        "out": str(out),
        "ingest": {"dataset": "image-masks", "source": str(tree)},
        "train": {"split": "train", "model": {"kind": "color"}},
        "predict": {"where": "split = 'val'"},
        "evaluate": {"protocol": "semantic", "missing": "skip"},
        "engine": {"kind": "inline", "threads": 1},
        **changes,
    }
    return parse(PipelineConfig, document, "test")


def add(tree: Path, split: str, number: int) -> None:
    generators.save(tree / "images" / split / f"item_{number}.png", generators.photo(number))
    generators.save(tree / "masks" / split / f"item_{number}.png", generators.labels(number, (0, 3, 900)))


def masks(out: Path) -> list[str]:
    return sorted(i for b in tables.scan(str(out / "masks"), "masks", ["sample_id"]) for i in b.column(0).to_pylist())


def trained_on(out: Path) -> int:
    return int(checkpoint.read(str(out / "model")).file.training["samples"])


def night(settings: PipelineConfig) -> list[str]:
    """What a run says."""
    notes = Notes()
    result = pipeline.run_pipeline(settings, notes)
    assert Path(result.report).is_file()
    return notes.lines


@pytest.mark.long
def test_a_finished_model_is_kept_when_the_data_change(tmp_path: Path) -> None:
    tree, out = generators.image_masks(tmp_path / "tree"), tmp_path / "out"
    settings = config(tree, out)
    kept = KEPT.format(out=out)
    assert kept not in night(settings)
    assert {p.name for p in out.iterdir()} == {"dataset", "model", "masks", "metrics", "report.html"}
    weights = checkpoint.read(str(out / "model")).file
    assert kept not in night(settings)

    add(tree, "train", 7)
    add(tree, "val", 8)
    (tree / "images" / "val" / "item_0.png").unlink()
    (tree / "masks" / "val" / "item_0.png").unlink()
    assert night(settings).count(kept) == 1
    assert masks(out) == ["val/item_1", "val/item_2", "val/item_8"]
    assert checkpoint.read(str(out / "model")).file == weights and trained_on(out) == 3
    rows = api.query(str(out / "metrics"), "SELECT sample_id FROM images WHERE status = 'ok' ORDER BY 1").to_pylist()
    assert [r["sample_id"] for r in rows] == masks(out)

    shutil.rmtree(out / "model")
    with pytest.raises(ConfigError, match="made with another configuration: digest"):
        night(settings)
    shutil.rmtree(out / "masks")
    assert kept not in night(settings)
    assert trained_on(out) == 4 and len(masks(out)) == 3


@pytest.mark.long
def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "camvid.toml").write_text(
        readme.split("## A pipeline in one file")[1].split("```toml\n")[1].split("```")[0]
    )
    generators.camvid(tmp_path / "data" / "camvid")
    monkeypatch.chdir(tmp_path)
    night(pipeline.load_pipeline("camvid.toml", ("engine.kind=inline",)))
    assert len(masks(tmp_path / "out" / "camvid")) == 3


@pytest.mark.long
def test_other_settings_of_a_training_are_refused(tmp_path: Path) -> None:
    tree, out = generators.image_masks(tmp_path / "tree"), tmp_path / "out"
    night(config(tree, out))
    with pytest.raises(ConfigError, match=r"another training: train\.model\.bits"):
        night(config(tree, out, train={"split": "train", "model": {"kind": "color", "bits": 3}}))


def test_an_unfinished_training_on_other_samples_is_said(tmp_path: Path) -> None:
    tree, out = generators.image_masks(tmp_path / "tree"), tmp_path / "out"
    night(config(tree, out))
    (out / "model" / checkpoint.MODEL_FILE).unlink()  # as it is before the training ends
    add(tree, "train", 7)
    with pytest.raises(ConfigError, match=r"out/model holds an unfinished training, and its samples have changed"):
        night(config(tree, out))


def test_a_model_may_be_trained_elsewhere(tmp_path: Path) -> None:
    tree, out = generators.image_masks(tmp_path / "tree"), tmp_path / "out"
    train = {"split": "train", "model": {"kind": "color"}, "out": str(tmp_path / "elsewhere")}
    night(config(tree, out, train=train))
    assert (tmp_path / "elsewhere" / checkpoint.MODEL_FILE).is_file() and len(masks(out)) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("[train]\nsplit = 'train'\nmodel.knd = 'color'", "knd"),
        ("[predict]\nwhere = ''", r"nothing to predict with \(give predict.model, or a \[train\] table\)"),
        ("[predict]\nmodle = 'color@x'", "did you mean model"),
    ],
)
def test_a_wrong_file_is_refused_before_any_work(tmp_path: Path, changes: str, says: str) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(f'out = "{tmp_path}/out"\n[ingest]\ndataset = "images"\nsource = "/nowhere"\n{changes}\n')
    with pytest.raises(ConfigError, match=says):
        pipeline.load_pipeline(str(file))
    assert not (tmp_path / "out").exists()
