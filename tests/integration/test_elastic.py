"""Actors follow the machines of a cluster, and leave when there is nothing for them to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import engine_doubles
import pytest

PROGRAM = Path(engine_doubles.__file__).with_name("elastic.py")


@pytest.mark.ray
def test_actors_follow_the_nodes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), str(PROGRAM.parent)])}
    environment = {k: v for k, v in environment.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sorted(seen["shards"]) == sorted(set(seen["shards"])) == [*range(len(seen["shards"]) - 1), 2000]
    assert seen["rows"][-1] == 3 * len(seen["shards"])
    # one CPU of the first machine is kept free; the other machine has two for actors
    alone, joined, left, joined_again, at_the_end = seen["actors"]
    assert (alone, joined, joined_again) == (1, 3, 3) and left in (1, 2)  # Ray chose who was on the one that left
    assert at_the_end == 2  # the one that works, and one for what it may have to leave
    begun = engine_doubles.runs_of(tmp_path / "log")
    assert len(begun) - len(seen["shards"]) <= 2  # what the lost machine had in flight
