"""Where it is decided how a model computes: GPUs are asked where workers would have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photos
import pytest
import torch

from segbatch import api
from segbatch.config import EngineConfig, ExecutionConfig, RunOptions
from segbatch.engine.inline import InlineEngine
from segbatch.errors import ConfigError
from segbatch.inference import execution
from segbatch.inference.execution import Execution
from segbatch.models import checkpoint
from segbatch.models.config import UNetConfig
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable

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


def predicted(root: Path, **inference: Any) -> dict[str, Any]:
    """``.segbatch/execution.json`` of a U-Net over six photos."""
    torch.manual_seed(0)
    config = UNetConfig(width=4, depth=3)
    checkpoint.write(str(root / "model"), UNet(config, 3), "unet", config, CLASSES, {"steps": 1})
    photos.folder(root / "photos", 6)
    options = RunOptions(engine=EngineConfig(kind="inline", threads=1), inference=ExecutionConfig(**inference))
    api.predict(f"unet@{root / 'model'}", str(root / "photos"), str(root / "out"), options=options)
    document: dict[str, Any] = json.loads((root / "out/.segbatch/execution.json").read_text())
    return document


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
