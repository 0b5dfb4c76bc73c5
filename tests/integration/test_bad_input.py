"""Bad photos, wrong arguments, places that cannot be written: what the user is told, and what is left behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import doubles
import numpy as np
import photos
import pytest
from numpy.typing import NDArray

from segbatch import api, cli, tables
from segbatch.errors import BadItemsError, ConfigError, StorageError
from segbatch.models import checkpoint
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.color import ColorTable
from segbatch.models.config import ColorConfig

REASONS = {
    "truncated.jpg": "cut",
    "empty.jpg": "empty",
    "notes.jpg": "not an image",
}
"""What the reason of a bad photo must say."""


@pytest.fixture(scope="module")
def folder_of_200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = photos.folder(tmp_path_factory.mktemp("two hundred"), 190)
    assert len(photos.odd_ones(root)) == 10
    return root


@pytest.fixture
def copy_of_200(tmp_path: Path, folder_of_200: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder_of_200, tmp_path / "in"))


@pytest.fixture(scope="module")
def color_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained colour classifier: red and blue."""
    root, config = tmp_path_factory.mktemp("model"), ColorConfig()
    net = ARCHITECTURES["color"].build(config, doubles.SPEC.classes)
    assert isinstance(net, ColorTable)
    pixels = np.asarray(photos.two_colors())
    net.observe(pixels, np.where(pixels[..., 0] > 127, 1, 2).astype(np.int16))
    net.settle()
    checkpoint.write(str(root), net, "color", config, doubles.SPEC.classes, {})
    return f"color@{root}"


def label_map(out: Path, sample_id: str) -> NDArray[np.uint16]:
    for batch in tables.scan(str(out), "masks", ["sample_id", "height", "width", "semantic"]):
        for row in batch.to_pylist():
            if row["sample_id"] == sample_id:
                runs = row["semantic"]
                flat = np.repeat([r["value"] for r in runs], [r["length"] for r in runs])
                return flat.reshape(row["height"], row["width"]).astype(np.uint16)
    raise AssertionError(f"no row {sample_id}")


@pytest.mark.ray
def test_folder_of_200(tmp_path: Path, copy_of_200: Path, ray_session: Path) -> None:
    source, out, log = copy_of_200, tmp_path / "out", tmp_path / "log"
    expected = {**dict.fromkeys(photos.sample_ids(source), "ok"), **photos.odd_ones(source)}
    result = doubles.predict(doubles.FreeModel(), source, out, shard_rows=16)
    found = photos.rows(out)
    assert {k: r["status"] for k, r in found.items()} == expected
    assert (result.state.rows, result.state.rows_done, result.state.bad) == (200, 200, 3)
    assert result.state.reasons == {"truncated": 1, "empty-file": 1, "not-an-image": 1}
    for name, words in REASONS.items():
        assert words in found[name]["error"], found[name]["error"]
    turned = label_map(out, "turned.jpg")
    assert turned.shape == (24, 32)
    assert (turned[:, :14] == doubles.RED).all() and (turned[:, 18:] == doubles.BLUE).all()
    assert label_map(out, "dot.png").tolist() == [[doubles.RED]]
    assert label_map(out, "grey.jpg").min() == doubles.RED | doubles.BLUE
    assert (label_map(out, "left/same.jpg") != label_map(out, "right/same.jpg")).any()

    # two are mended: a retry looks at them, and at nothing else but the third
    for i, name in enumerate(("truncated.jpg", "empty.jpg")):
        (source / name).write_bytes(photos.jpeg(500 + i))
    before = photos.part_times(out)
    options = api.RunOptions.model_validate({"plan": {"shard_rows": 16}})
    retried = api.retry(str(out), model=doubles.FreeModel(str(log)), limits=api.Limits(1.0), options=options)
    found = photos.rows(out)
    assert [k for k, r in found.items() if r["status"] != "ok"] == ["notes.jpg"]
    assert (retried.state.rows_done, retried.state.bad, doubles.images_seen(log)) == (200, 1, 2)
    after = photos.part_times(out)
    assert 1 <= sum(before[k] != after[k] for k in before) <= 3 and before.keys() == after.keys()

    # the same command again sees that two files have changed, and that their rows are of these files already
    result = doubles.predict(doubles.FreeModel(str(log)), source, out, shard_rows=16)
    assert (result.state.rows, result.state.bad, doubles.images_seen(log)) == (200, 1, 2)
    assert photos.rows(out) == found
    assert doubles.predict(doubles.FreeModel(str(log)), source, out, shard_rows=16).rows == 0
    photos.assert_clean(out)


@pytest.mark.ray
def test_command_line_over_200(
    tmp_path: Path, folder_of_200: Path, color_model: str, ray_session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", color_model, str(folder_of_200), str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 3
    said = capsys.readouterr().err
    assert "200 of 200 images in" in said and "3 bad" in said
    last = said.splitlines()[-1]
    assert last.startswith("segbatch: 3 of 200 images are bad (") and "--max-bad-fraction 0 allows" in last

    cli.main([*command, "--max-bad-fraction", "0.02"])
    state = json.loads(capsys.readouterr().out)
    assert (state["rows"], state["rows_done"], state["bad"], state["rows_now"]) == (200, 200, 3, 0)

    with pytest.raises(SystemExit) as left:
        cli.main(["retry", str(tmp_path / "out"), "--failed"])
    assert left.value.code == 3
    assert (label_map(tmp_path / "out", "turned.jpg")[:, :12] == 1).all()


def test_row_limits(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 18), tmp_path / "out"
    photos.odd_ones(source)
    options = api.RunOptions.model_validate({"engine": {"kind": "inline"}})
    with pytest.raises(BadItemsError, match=r"3 of 28 images are bad .* every other row is done"):
        api.predict(doubles.FreeModel(), str(source), str(out), options=options, limits=api.Limits(0.1))
    assert len(photos.rows(out)) == 28
    api.predict(doubles.FreeModel(), str(source), str(out), options=options, limits=api.Limits(0.11))
    limits = api.Limits(1.0, fail_fast=True)
    with pytest.raises(BadItemsError, match="leave out --fail-fast"):
        api.predict(doubles.FreeModel(), str(source), str(tmp_path / "fast"), options=options, limits=limits)


@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_failing_batch_is_split(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("ray_session")
    source, out, log = photos.folder(tmp_path / "in", 16), tmp_path / "out", tmp_path / "log"
    (source / "photo-0005.jpg").write_bytes(photos.jpeg(5, photos.MARKER))
    doubles.predict(doubles.FailingModel(str(log)), source, out, kind, batch_size=8)
    found = photos.rows(out)
    bad = {k: (r["status"], r["error"]) for k, r in found.items() if r["status"] != "ok"}
    assert len(found) == 16
    assert bad == {
        "photo-0005.jpg": ("model-error", "the model raised RuntimeError: the network does not like this image")
    }
    assert doubles.images_seen(log) == 8 + 4 + 4 + 2 + 2 + 1 + 1 + 8
    assert len(doubles.loads(log)) == 1


def test_unreadable_photo_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file that the store refuses is not the end of the run; one that vanishes is not either."""
    from segbatch import storage

    source, out = photos.folder(tmp_path / "in", 4), tmp_path / "out"
    read = storage.read_bytes

    def refuse(uri: str) -> bytes:
        if uri.endswith("photo-0001.jpg"):
            raise StorageError(f"cannot read {uri}: permission denied", "mend its permissions")
        if uri.endswith("photo-0002.jpg"):
            os.unlink(uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    result = doubles.predict(doubles.FreeModel(), source, out, "inline")
    assert result.state.reasons == {"unreadable": 1, "missing": 1}
    assert "permission denied" in photos.rows(out)["photo-0001.jpg"]["error"]


# -- what stops before any work -------------------------------------------------------------------------------------


def message(call: Callable[[], object], error: type[Exception]) -> str:
    """The one line that is printed."""
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and getattr(caught.value, "fix", "") in said
    return said


def test_another_configuration(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 2), tmp_path / "out"
    doubles.predict(doubles.FreeModel(), source, out, "inline")
    before = photos.part_times(out)
    call = lambda: api.predict(doubles.FreeModel(), str(source), str(out), max_pixels=5)  # noqa: E731
    said = message(call, ConfigError)
    assert said.endswith("max_pixels: 200000000 -> 5 (choose another output, or delete this one)")
    said = message(lambda: api.ingest("images", str(source), str(out)), ConfigError)
    assert said == f"{out} holds the output of segbatch predict (choose another output)"
    assert photos.part_times(out) == before


def test_missing_input_claims_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = message(lambda: doubles.predict(doubles.FreeModel(), tmp_path / "nowhere", out, "inline"), ConfigError)
    assert said.startswith(f"{tmp_path / 'nowhere'} does not exist (give a folder")
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    message(lambda: doubles.predict(doubles.FreeModel(), tmp_path / "empty", out, "inline"), ConfigError)
    assert not out.exists()


@pytest.mark.parametrize("below", ["file/out", "file", "/proc/nowhere/out"])
def test_output_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    source, out = photos.folder(tmp_path / "in", 2), tmp_path / below
    (tmp_path / "file").write_text("a file")
    said = message(lambda: doubles.predict(doubles.FreeModel(), source, out, "inline"), StorageError)
    assert str(out) in said


def test_file_in_the_place_of_the_table(tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    (out / "masks").write_text("a file")
    said = message(lambda: doubles.predict(doubles.FreeModel(), source, out, "inline"), StorageError)
    assert "masks" in said and "a file is in the way" in said
    (out / "masks").unlink()
    assert doubles.predict(doubles.FreeModel(), source, out, "inline").state.rows_done == 2


def test_ids_that_occur_twice_leave_no_plan(tmp_path: Path) -> None:
    from segbatch.config import PlanConfig
    from segbatch.records import PlanItem
    from segbatch.runs import Run

    run = Run(str(tmp_path), "masks")
    items = [PlanItem("same", f"/{i}.jpg", "1-1", 1) for i in range(2)]
    said = message(lambda: run.plan(lambda: items, PlanConfig()), ConfigError)
    assert said.startswith("1 sample ids occur twice, for example same")
    assert list((tmp_path / ".segbatch" / "plans").iterdir()) == []
    assert run.plan(lambda: items[:1], PlanConfig()) is not None
    message(lambda: run.plan(lambda: items, PlanConfig()), ConfigError)
    assert len(run.plans()) == 1
