"""The nightly flow: its artifacts, its retries, how it stops, and the deployment that schedules it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from flows import nightly
from segbatch import api, pipeline, storage, tables
from segbatch.errors import (
    BadItemsError,
    ConfigError,
    EngineError,
    IncompleteRunError,
    StoppedError,
    StorageError,
    TransientStorageError,
)

pytestmark = [pytest.mark.flows, pytest.mark.usefixtures("prefect_url")]

PROJECT = Path(__file__).resolve().parent.parent.parent
PREFECT = Path(sys.executable).with_name("prefect")

CONFIG = """
out = "{out}"
[ingest]
dataset = "image-masks"
source = "{source}"
[train]
split = "train"
model.kind = "color"
[evaluate]
protocol = "semantic"
[plan]
shard_rows = 4
[engine]
kind = "inline"
attempts = 1
"""

Write = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, shelves: Path, request: pytest.FixtureRequest) -> str:
    """A pipeline file of this test's own, named after the test."""
    path = tmp_path / f"{request.node.name}.toml"
    path.write_text(CONFIG.format(out=tmp_path / "out", source=shelves))
    return str(path)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    for stage in (nightly.ingest, nightly.train, nightly.predict, nightly.evaluate, nightly.report):
        monkeypatch.setattr(stage, "retry_delay_seconds", [0.1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are called, in order."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        stage = getattr(pipeline, f"{name}_stage")

        def call(*arguments: Any) -> Any:
            made.append(name)
            return stage(*arguments)

        return call

    for name in ("ingest", "train", "predict", "evaluate", "report"):
        monkeypatch.setattr(pipeline, f"{name}_stage", counted(name))
    return made


@pytest.fixture
def on_commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], None]], list[str]]:
    """Calls somebody before each part of a masks table is created; gives the parts created so far."""

    def install(before: Callable[[str], None]) -> list[str]:
        created: list[str] = []
        create = storage.create

        def watched(uri: str, data: bytes) -> None:
            is_part = "/masks/masks/part-" in uri
            if is_part:
                before(uri)
            create(uri, data)
            if is_part:
                created.append(storage.name_of(uri))

        monkeypatch.setattr(storage, "create", watched)
        return created

    return install


def artifact(key: str) -> Any:
    """The latest content under a key; tables are parsed."""
    from prefect.artifacts import Artifact

    found = Artifact.get(key)
    assert found is not None, key
    return json.loads(found.data) if found.type == "table" else found.data


def place(config: str, name: str) -> str:
    return pipeline.load_pipeline(config).place(name)


# -- a night ---------------------------------------------------------------------------------------------------------


def test_a_night_publishes_what_the_tables_say(config: str, calls: list[str]) -> None:
    headline = nightly.nightly(config)
    assert calls == ["ingest", "train", "predict", "evaluate", "report"]
    rows = api.query(place(config, "metrics"), 'SELECT metric, "class", value FROM summary').to_pylist()
    expected = {r["metric"]: r["value"] for r in rows if not r["class"]}
    assert headline == expected
    assert 0.2 < expected["miou"] < 1

    key = nightly.name_of(config)
    figures = {r["figure"]: r["value"] for r in artifact(f"{key}-figures")}
    assert figures == {k: round(v, 6) for k, v in expected.items()}
    classes = {r["class"]: r for r in artifact(f"{key}-classes")}
    assert list(classes) == ["background", "shelf board", "price rail", "product", "gap"]
    (iou,) = [r["value"] for r in rows if (r["metric"], r["class"]) == ("iou", "gap")]
    assert classes["gap"]["iou"] == round(iou, 6)

    page = place(config, "report.html")
    assert artifact(f"{key}-report") == f"[report.html](file://{page})"
    assert f"| miou | {expected['miou']:.4f} |" in artifact(f"{key}-summary")
    worst = artifact(f"{key}-worst")
    assert worst.count("](data:image/jpeg;base64,/9j/") == 3 and len(worst) < 1_000_000
    (lowest,) = api.query(
        place(config, "metrics"), "SELECT sample_id FROM images ORDER BY score, 1 LIMIT 1"
    ).to_pylist()
    assert f"## 1. `{lowest['sample_id']}`" in worst
    assert artifact(f"{key}-predict-progress") == 100


def test_the_next_night_does_only_what_is_new(config: str, shelves: Path, tmp_path: Path) -> None:
    copy = tmp_path / "growing"
    subprocess.run(["cp", "-r", shelves, copy], check=True)
    change = [f"ingest.source={copy}"]
    nightly.nightly(config, change)
    before = {p.uri: p.etag for p in tables.parts(place(config, "masks") + "/masks")}
    for folder, suffix in (("images", ".jpg"), ("masks", ".png"), ("instances", ".png")):
        photo = (copy / folder / "val" / f"shelf_0005{suffix}").read_bytes()
        for split in ("train", "val"):  # the model was trained without the new one, and is kept
            (copy / folder / split / f"new{suffix}").write_bytes(photo)
    headline = nightly.nightly(config, change)
    assert isinstance(headline, dict) and headline["images_scored"] == 17
    after = {p.uri: p.etag for p in tables.parts(place(config, "masks") + "/masks")}
    assert before.items() < after.items() and len(after) == len(before) + 1


def test_a_model_that_is_given_is_not_trained(config: str, calls: list[str], tmp_path: Path) -> None:
    nightly.nightly(config)
    calls.clear()
    other = tmp_path / "given.toml"
    text = Path(config).read_text().replace('[train]\nsplit = "train"\nmodel.kind = "color"\n', "")
    other.write_text(text.replace(str(tmp_path / "out"), str(tmp_path / "other")))
    nightly.nightly(str(other), [f"predict.model=color@{tmp_path}/out/model"])
    assert calls == ["ingest", "predict", "evaluate", "report"]


@pytest.mark.ray
def test_a_night_on_ray_gives_the_same_figures(config: str, ray_session: Path, tmp_path: Path) -> None:
    inline = nightly.nightly(config)
    on_ray = nightly.nightly(config, ["engine.kind=ray", f"out={tmp_path}/ray"])
    assert on_ray == inline


def test_progress_is_written_every_thirty_seconds(
    config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows import progress

    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    nightly.nightly(config)
    lines = [r.getMessage() for r in caplog.records if r.name == "prefect.task_runs"]
    assert "predict: 15 images" in lines
    assert any(line.startswith("4 of 15 images, ") and "ETA" in line for line in lines)
    assert any(line.startswith("15 of 15 images in 4 shards; 15 done now") for line in lines)


# -- retries ---------------------------------------------------------------------------------------------------------


def test_a_lost_store_is_tried_again_and_no_shard_done_twice(
    config: str, calls: list[str], on_commit: Callable[..., list[str]]
) -> None:
    failures = iter([False, False, True])

    def fail_third(uri: str) -> None:
        if next(failures, False):
            raise TransientStorageError(f"cannot write {uri}: the store is away")

    created = on_commit(fail_third)
    headline = nightly.nightly(config)
    assert isinstance(headline, dict) and headline["images_scored"] == 15
    assert calls.count("predict") == 2
    assert len(created) == len(set(created)) == 4


def test_a_wrong_configuration_is_not_tried_again(config: str, calls: list[str]) -> None:
    with pytest.raises(ConfigError, match="semantix"):
        nightly.nightly(config, ["evaluate.protocol=semantix"])
    assert calls == ["ingest", "train", "predict", "evaluate"]


def test_bad_photos_are_not_tried_again(config: str, calls: list[str], shelves: Path, tmp_path: Path) -> None:
    copy = tmp_path / "broken"
    subprocess.run(["cp", "-r", shelves, copy], check=True)
    (copy / "images" / "train" / "shelf_0001.jpg").write_bytes(b"not a photo")
    with pytest.raises(BadItemsError, match="1 of 15 images are bad"):
        nightly.nightly(config, [f"ingest.source={copy}"])
    assert calls == ["ingest"]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConfigError("x"), False),
        (BadItemsError("x"), False),
        (StoppedError("x"), False),
        (StorageError("x"), False),
        (TransientStorageError("x"), True),
        (EngineError("x"), True),
        (IncompleteRunError("x"), True),
        (RuntimeError("x"), True),
    ],
)
def test_what_is_tried_again(error: Exception, again: bool) -> None:
    from prefect.states import Failed

    assert nightly.worth_retrying(None, None, Failed(data=error)) is again


def test_sigterm_finishes_the_shard_and_the_next_run_goes_on(
    config: str, calls: list[str], on_commit: Callable[..., list[str]]
) -> None:
    from prefect.exceptions import CancelledRun

    signals = iter([True])

    def terminate(uri: str) -> None:
        if next(signals, False):
            os.kill(os.getpid(), signal.SIGTERM)

    created = on_commit(terminate)
    with pytest.raises(CancelledRun, match="stopped before the end"):
        nightly.nightly(config)
    assert calls == ["ingest", "train", "predict"]
    assert len(created) == 2  # as many are in flight at a time
    assert isinstance(nightly.nightly(config), dict)
    assert len(created) == len(set(created)) == 4


# -- as a script, as a deployment ------------------------------------------------------------------------------------


def test_as_a_script(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nightly.main([config, "--set", "report.worst=2"]) == 0
    assert storage.exists(place(config, "report.html"))
    assert nightly.main([config, "--set", "report.wurst=2"]) == 2
    assert "did you mean worst?" in capsys.readouterr().err


def test_a_failure_ends_with_its_line(config: str, prefect_url: str) -> None:
    done = subprocess.run(
        [sys.executable, PROJECT / "flows" / "nightly.py", config, "--set", "predict.where=nonsense"],
        cwd=PROJECT, env={**os.environ, "PREFECT_API_URL": prefect_url, "PYTHONPATH": str(PROJECT)},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("segbatch: --where nonsense: Binder Error"), done.stderr


def test_the_example_is_valid() -> None:
    assert pipeline.load_pipeline(str(PROJECT / nightly.PIPELINE)).predict.model == "unet@demo-out/model"
    assert nightly.name_of("infra/pipelines/Store_12 shelves.toml") == "store-12-shelves"


def test_a_deployment_runs_on_a_worker(config: str, prefect_url: str, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    environment = {**os.environ, "PREFECT_API_URL": prefect_url}

    def prefect(*words: str) -> str:
        command = [PREFECT, "--no-prompt", *words]
        done = subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="segbatch", type="process"))
        assert "nightly/nightly" in prefect("deploy", "--all")
        deployment = client.read_deployment_by_name("nightly/nightly")
        assert deployment.parameters == {"config": nightly.PIPELINE}
        assert [s.schedule.cron for s in deployment.schedules] == ["0 2 * * *"]
        options = deployment.concurrency_options
        assert options is not None and options.collision_strategy.value == "CANCEL_NEW"
        run: UUID = client.create_flow_run_from_deployment(deployment.id, parameters={"config": config}).id
        prefect("worker", "start", "--pool", "segbatch", "--run-once")
        state = client.read_flow_run(run).state
    assert state is not None and state.is_completed(), state
    assert {r["figure"]: r["value"] for r in artifact(f"{nightly.name_of(config)}-figures")}["images_scored"] == 15
