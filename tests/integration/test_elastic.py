"""Actors follow the machines of a cluster, and leave when there is nothing for them to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_doubles
import pytest

HERE = Path(engine_doubles.__file__).parent


def said(program: str, *arguments: object) -> Any:
    """What a program with a cluster of its own prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    environment = {k: v for k, v in environment.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")}
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_actors_follow_the_nodes(tmp_path: Path) -> None:
    seen = said("elastic.py", tmp_path)
    assert sorted(seen["shards"]) == sorted(set(seen["shards"])) == [*range(len(seen["shards"]) - 1), 2000]
    assert seen["rows"][-1] == 3 * len(seen["shards"])
    # one CPU of the first machine is kept free; the other machine has two for actors
    alone, joined, left, joined_again, at_the_end = seen["actors"]
    assert (alone, joined, joined_again) == (1, 3, 3) and left in (1, 2)  # Ray chose who was on the one that left
    assert at_the_end == 2  # the one that works, and one for what it may have to leave
    begun = engine_doubles.runs_of(tmp_path / "log")
    assert len(begun) - len(seen["shards"]) <= 2  # what the lost machine had in flight


@pytest.mark.ray
def test_a_gpu_is_asked_where_there_is_one() -> None:
    """The head of many a cluster has none."""
    seen = said("gpu_elsewhere.py")
    assert not seen["before"]
    assert seen["has_gpus"]
    assert [(node, gpus) for node, gpus, _ in seen["places"]] == [(seen["there"], "0")] * 2
    assert len({seen["here"], *(pid for _, _, pid in seen["places"])}) == 3  # each ends, and leaves the GPU's memory
    assert seen["refused"] == "ConfigError: no format agrees (lower --min-agreement)"
    assert seen["dies"].startswith("EngineError: the process that was to measure on a GPU died")
