"""Time and memory of ingesting one large CT: 512 x 512 x 600, gzipped, with its labels; must stay below 1.5 GB.

python tests/bench/bench_volume.py [--slices 600] [--plain]
"""

import argparse
import gzip
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

SIDE = 512
LIMIT_MB = 1500


def write(path: Path, dtype: str, slices: Iterable[NDArray[Any]], count: int) -> None:
    """A NIfTI file slice by slice; gzipped where its name ends so."""
    header = Nifti1Header()
    header.set_data_shape((SIDE, SIDE, count))
    header.set_data_dtype(dtype)
    header.set_zooms((0.7, 0.7, 1.0))
    header.set_sform(np.diag([-0.7, -0.7, 1.0, 1.0]), 1)
    header["vox_offset"] = 352
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        for pixels in slices:
            file.write(pixels.astype(dtype).tobytes())


def draw(folder: Path, count: int, suffix: str) -> None:
    """A noisy body in air, a liver in it and lesions in that."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 20, (8, SIDE, SIDE)).astype(np.int16)
    y, x = np.mgrid[:SIDE, :SIDE]
    body = (x - 256) ** 2 / 210**2 + (y - 256) ** 2 / 150**2 < 1

    def ct() -> Iterable[NDArray[Any]]:
        for k in range(count):
            yield np.where(body, 50, -1000) + np.roll(noise[k % 8], k, axis=1)

    def labels() -> Iterable[NDArray[Any]]:
        for k in range(count):
            depth = 1 - (2 * k / count - 1) ** 2
            liver = (x - 190) ** 2 / 110**2 + (y - 240) ** 2 / 90**2 < depth
            lesion = (x - 170 - 40 * (k % 3)) ** 2 + (y - 240) ** 2 < 15**2
            yield liver + (liver & lesion).astype(np.uint8)

    write(folder / f"volume-0{suffix}", "int16", ct(), count)
    write(folder / f"segmentation-0{suffix}", "uint8", labels(), count)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--plain", action="store_true", help="not gzipped")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "lits"), Path(scratch, "out")
        source.mkdir()
        draw(source, arguments.slices, ".nii" if arguments.plain else ".nii.gz")
        read = sum(p.stat().st_size for p in source.iterdir())
        began = time.perf_counter()
        command = [sys.executable, "-m", "segbatch.cli", "ingest", "lits", str(source), str(out), "--engine", "inline"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        written = sum(p.stat().st_size for p in out.rglob("*.parquet"))
    print(
        f"{arguments.slices} slices, {read / 1e6:.0f} MB read, {written / 1e6:.0f} MB written: {seconds:.1f} s, "
        f"{arguments.slices / seconds:.0f} slices/s, peak {peak:.0f} MB"
    )
    if peak > LIMIT_MB:
        sys.exit(f"more than {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
