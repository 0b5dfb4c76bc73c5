"""Compiled code is kept on disk where that is possible, and everything works where it is not."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SOURCE = """
import numpy as np
from segbatch.codecs._jit import kept

@kept
def doubled(values):
    return values * 2
"""


def fresh(path: Path) -> ModuleType:
    """The module anew, as another process has it."""
    found = importlib.util.spec_from_file_location("compiled_here", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "compiled_here.py"
    path.write_text(SOURCE)
    return path


def hits(module: ModuleType) -> int:
    """How often machine code was found on disk."""
    return sum(module.doubled.stats.cache_hits.values())


def twice(module: ModuleType, values: list[float], kind: type) -> list[float]:
    found: list[float] = module.doubled(np.array(values, kind)).tolist()
    return found


def test_machine_code_is_kept(source: Path) -> None:
    assert twice(fresh(source), [1, 2], np.int64) == [2, 4]
    again = fresh(source)
    assert twice(again, [1, 2], np.int64) == [2, 4]
    assert hits(again) == 1


def test_broken_files_are_compiled_anew(source: Path) -> None:
    twice(fresh(source), [1], np.int64)
    files = list(source.parent.rglob("*.nb[ic]"))
    assert len(files) == 2
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[: len(before) // 2 if file.suffix == ".nbc" else 0])
        assert twice(fresh(source), [1], np.int64) == [2]
        file.write_bytes(before)


def test_code_for_other_arguments_is_not_taken(source: Path) -> None:
    """Two processes that compile for other arguments at the same time call their files the same."""
    one, other = fresh(source), fresh(source)
    twice(one, [1], np.int64)
    kept = {p: p.read_bytes() for p in source.parent.rglob("*.nb[ic]")}
    for path in kept:
        path.unlink()
    twice(other, [1.5], np.float64)
    (code,) = source.parent.rglob("*.nbc")
    code_of_floats = code.read_bytes()
    for path, content in kept.items():
        path.write_bytes(content)
    code.write_bytes(code_of_floats)
    third = fresh(source)
    assert twice(third, [1], np.int64) == [2]
    assert third.doubled(np.array([1])).dtype == np.int64


def test_it_works_without_a_folder_to_write_to(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert twice(fresh(source), [1.5], np.float64) == [3]
    assert not list(source.parent.rglob("*.nb[ic]"))


@pytest.mark.parametrize("name", ["segbatch.inference.pipeline", "segbatch.models.rcnn_parts"])
def test_importing_does_not_load_numba(name: str) -> None:
    code = f"import sys, {name}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
