"""What the driver costs with a million shards: planning, resuming, finishing; no photo is read and no model runs.

python tests/bench/bench_million_shards.py [SHARDS]       wall and CPU seconds, peak memory of a process for each step
"""

import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulated_run import SimulatedRun

from segbatch.errors import StoppedError

SECONDS = 60.0
GIGABYTE = 1e9


def plan(root: Path, shards: int) -> str:
    """A new root: list the input, cut it, publish, and begin."""
    simulated = SimulatedRun(root, shards)
    simulated.limit = 1
    with simulated.patched(), contextlib.suppress(StoppedError):
        simulated.carry_out()
    return f"{len(simulated.run.shards())} shards planned"


def half(root: Path, shards: int) -> str:
    """The same command again: list and compare the input, see what lacks, do half of it, and be stopped."""
    simulated = SimulatedRun(root, shards)
    simulated.limit = shards // 2
    with simulated.patched(), contextlib.suppress(StoppedError):
        simulated.carry_out()
    np.save(root / "there.npy", simulated.store.is_there)
    return f"{simulated.store.calls['work']} done now"


def resume(root: Path, shards: int) -> str:
    """The same again with half of the shards there; it finishes."""
    simulated = SimulatedRun(root, shards)
    simulated.store.is_there = np.load(root / "there.npy")
    with simulated.patched():
        result = simulated.carry_out()
    calls = simulated.store.calls
    return f"{calls['work']} done now, {result.state.shards_done} in all, {calls['footer']} footers read"


def nothing(root: Path, shards: int) -> str:
    """The same again when everything is done."""
    simulated = SimulatedRun(root, shards)
    simulated.store.is_there[:] = True
    with simulated.patched():
        result = simulated.carry_out()
    return f"{result.rows} rows now, {result.state.rows_done} in all"


def state(root: Path, shards: int) -> str:
    """What ``segbatch status`` asks."""
    simulated = SimulatedRun(root, shards)
    simulated.store.is_there[:] = True
    with simulated.patched():
        found = simulated.run.state()
    return f"{found.rows_done} of {found.rows} rows"


STEPS: dict[str, Callable[[Path, int], str]] = {f.__name__: f for f in (plan, half, resume, nothing, state)}


def main() -> int:
    """Every step in a process of its own; 1 when one takes more than its 60 s or 1 GB."""
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    slow = []
    print(f"{'step':<10}{'wall s':>8}{'CPU s':>8}{'MB':>7}  what it said")
    with tempfile.TemporaryDirectory() as folder:
        for name in STEPS:
            command = [sys.executable, __file__, name, folder, str(shards)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(maxsplit=3)
            wall, cpu, memory = (float(f) for f in found[:3])
            print(f"{name:<10}{wall:>8.1f}{cpu:>8.1f}{memory / 1e6:>7.0f}  {found[3].strip()}", flush=True)
            slow += [name] if wall > SECONDS or memory > GIGABYTE else []
    print(f"beyond {SECONDS:.0f} s or 1 GB: {', '.join(slow) or 'none'}")
    return bool(slow)


def step(name: str, root: Path, shards: int) -> None:
    """Run one step in this process and print what it took."""
    began = time.perf_counter()
    said = STEPS[name](root, shards)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, said)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        step(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        raise SystemExit(main())
