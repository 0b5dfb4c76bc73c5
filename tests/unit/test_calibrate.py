"""Where it is decided how a model computes: GPUs are asked where workers would have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photos
import pytest
import torch

from segbatch import api, jobs
from segbatch.config import EngineConfig, ExecutionConfig, RunOptions
from segbatch.engine.inline import InlineEngine
from segbatch.errors import ConfigError
from segbatch.inference import execution
from segbatch.inference.execution import Execution
from segbatch.inference.options import InferenceOptions
from segbatch.jobs import Limits
from segbatch.models import checkpoint
from segbatch.models.config import UNetConfig
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable
from segbatch.runs import Run

ALL = Limits(1.0)
CLASSES = ClassTable(tuple(ClassInfo(i, f"class {i}") for i in range(3)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked where the workers have a GPU; torch finds it there."""
    found: list[Any] = []

    def on_gpu(_: InlineEngine, ask: Callable[[], Any]) -> Any:
        found.append(ask)
        return ask()

    monkeypatch.setattr(InlineEngine, "has_gpus", lambda _: True)
    monkeypatch.setattr(InlineEngine, "on_gpu", on_gpu)
    monkeypatch.setattr(execution, "gpu_there", lambda: True)
    return found


def network(root: Path) -> str:
    """A small U-Net."""
    torch.manual_seed(0)
    config = UNetConfig(width=4, depth=3)
    checkpoint.write(str(root / "model"), UNet(config, 3), "unet", config, CLASSES, {"steps": 1})
    return f"unet@{root / 'model'}"


def predicted(root: Path, **inference: Any) -> dict[str, Any]:
    """``.segbatch/execution.json`` of a U-Net over six photos."""
    photos.folder(root / "photos", 6)
    options = RunOptions(engine=EngineConfig(kind="inline", threads=1), inference=ExecutionConfig(**inference))
    api.predict(network(root), str(root / "photos"), str(root / "out"), options=options)
    document: dict[str, Any] = json.loads((root / "out/.segbatch/execution.json").read_text())
    return document


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"flip": True},
        {"scales": (0.5, 1.0)},
        {"tile": 256, "overlap": 32},
        {"confidence": True},
        {"confidence": True, "flip": True, "tile": 512, "scales": (1.0, 1.5)},
    ],
)
def test_a_run_can_be_told_again_from_its_root(tmp_path: Path, said: dict[str, Any]) -> None:
    """Whatever was asked of the model; ``retry`` and ``status`` begin so."""
    photos.folder(tmp_path / "photos", 2)
    (tmp_path / "photos" / "odd.jpg").write_bytes(b"not a photo")
    options = RunOptions(engine=EngineConfig(kind="inline", threads=1))
    out = str(tmp_path / "out")
    how = InferenceOptions.model_validate(said)
    result = api.predict(network(tmp_path), str(tmp_path / "photos"), out, inference=how, limits=ALL, options=options)
    assert result.state.bad == 1
    asked_for = jobs.job_of(out).config
    assert asked_for == Run(out, "masks").document()["config"]  # type: ignore[index]
    (tmp_path / "photos" / "odd.jpg").write_bytes(photos.jpeg(3))
    assert api.retry(out, options=options).state.bad == 0


def test_the_machines_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    looked_at: list[int] = []

    def decide(load: Callable[[], Any], given: list[Any], wanted: ExecutionConfig) -> Execution:
        assert load().spec.task == "semantic"
        looked_at.append(len(given))
        return Execution(batch_size=5, why="so it was decided")

    monkeypatch.setattr(execution, "decide_on_gpu", decide)
    assert predicted(tmp_path)["execution"]["batch_size"] == 5
    assert len(asked) == 1
    assert looked_at == [4]


def test_where_torch_cannot_use_the_gpu_it_is_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.setattr(execution, "gpu_there", lambda: False)
    assert predicted(tmp_path)["said"] == "computing in float32 on the cpu: 6 photos are not worth measuring"
    assert len(asked) == 1


def test_a_gpu_that_must_be_is_looked_for(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no cuda device here"):
        predicted(tmp_path, device="cuda")
