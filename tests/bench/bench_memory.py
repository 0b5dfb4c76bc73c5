"""Memory of driver and actor over runs of growing length: it must not grow with the number of images.

python tests/bench/bench_memory.py [--images 2000 20000]
"""

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from bench_engine import FreeModel, draw_photos

import segbatch
from segbatch.config import EngineConfig, PlanConfig, RunOptions


@dataclass
class Peaks:
    """Samples the resident memory of this process and of the Ray actors below it, five times a second."""

    driver: float = 0.0
    actor: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        me = psutil.Process()
        while not self.stop.wait(0.2):
            self.driver = max(self.driver, me.memory_info().rss / 1e6)
            for process in me.children(recursive=True):
                self._look(process)

    def _look(self, process: psutil.Process) -> None:
        try:
            if process.name().startswith("ray::_Actor"):
                self.actor = max(self.actor, process.memory_full_info().uss / 1e6)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return


def measure(folder: Path, limit: int) -> Peaks:
    """Peaks of one run over the first ``limit`` photos."""
    peaks = Peaks()
    thread = threading.Thread(target=peaks.watch)
    thread.start()
    options = RunOptions(engine=EngineConfig(kind="ray"), plan=PlanConfig(shard_rows=256))
    try:
        with tempfile.TemporaryDirectory() as out:
            segbatch.predict(FreeModel(), str(folder), f"{out}/masks", options=options, limit=limit, batch_size=8)
    finally:
        peaks.stop.set()
        thread.join()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 20_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw_photos(folder, max(arguments.images))
        measure(folder, 256)  # imports and caches
        for count in arguments.images:
            began = time.monotonic()
            peaks = measure(folder, count)
            print(
                f"{count:7} images: driver {peaks.driver:6.0f} MB, actor {peaks.actor:6.0f} MB (own pages), "
                f"{time.monotonic() - began:.0f} s"
            )


if __name__ == "__main__":
    main()
