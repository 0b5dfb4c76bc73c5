"""What a GPU does: one network by every engine and number format, its utilisation, and ``segbatch predict`` end to end.

Bare: a batch that lies on the GPU, over and over, by torch alone. Network: batches from the host's memory through
``GpuSegmenter`` by as many threads as it has lanes, label maps back in numpy. Predict: files in, Parquet out, the
model's load excluded. Agreement: pixels with the label of eager float32 (means little for the random weights of the
default).

    sh tests/bench/gpu.sh [--model MODEL] [--folder PHOTOS] [--seconds 5]

``--fake`` goes through all of it on the CPU, to see that it runs; its figures mean nothing.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_device import FakeDevice
from numpy.typing import NDArray

import segbatch
from segbatch.codecs import photo, png
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.inference import compose, gpu
from segbatch.inference.pipeline import Predictor, Prepared
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.config import UNetConfig
from segbatch.models.network import TorchSegmenter
from segbatch.models.registry import ModelSource
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable

CLASSES = 19
THREADS = 2


@dataclass(frozen=True)
class Way:
    """One way of computing; see ``gpu.Wanted``."""

    name: str
    dtype: str = "float32"
    engine: str = "eager"
    batch_size: int = 1
    channels_last: bool = True
    device: str = "cuda"


WAYS = (
    Way("eager float32"),
    Way("autocast float16", "float16"),
    Way("autocast bfloat16", "bfloat16"),
    Way("autocast bfloat16, not channels last", "bfloat16", channels_last=False),
    Way("torch.compile bfloat16", "bfloat16", "inductor"),
    Way("CUDA graphs bfloat16", "bfloat16", "cudagraphs"),
)


@dataclass(frozen=True)
class RandomUNet:
    """A U-Net with random weights, fed at a fixed size."""

    width: int
    side: int
    reference: str = "unet with random weights"

    def describe(self) -> ModelSpec:
        classes = ClassTable(tuple(ClassInfo(i, f"class {i}") for i in range(CLASSES)))
        wants = InputSpec(self.side, self.side, "stretch")
        return ModelSpec(self.reference, "semantic", classes, wants, "logits", f"unet-{self.width}-{self.side}")

    def load(self, threads: int) -> Segmenter:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        return TorchSegmenter(UNet(UNetConfig(width=self.width), CLASSES), self.describe())


@dataclass(frozen=True)
class OnGpu:
    """Another source's model, computing as wanted."""

    member: ModelSource
    way: Way
    fake: bool

    @property
    def reference(self) -> str:
        return self.member.reference

    def describe(self) -> ModelSpec:
        return self.member.describe()

    def load(self, threads: int) -> Segmenter:
        return gpu.accelerated(self.member.load(1), self.way, FakeDevice() if self.fake else None)


def rate(work: Callable[[], int], seconds: float) -> float:
    """Images per second of ``work``, called again and again by ``THREADS`` threads."""
    stop = time.perf_counter() + seconds
    began = time.perf_counter()

    def again(_: int) -> int:
        done = 0
        while time.perf_counter() < stop:
            done += work()
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(again, range(THREADS))) / (time.perf_counter() - began)


def bare(segmenter: gpu.GpuSegmenter, prepared: Prepared, size: int, seconds: float, fake: bool) -> float:
    """Images per second of the network on a batch that lies there already, in one thread."""
    batch = torch.from_numpy(np.repeat(prepared.tensor[None], size, 0)).to(segmenter._device.where)
    wait = (lambda: None) if fake else torch.cuda.synchronize
    with torch.inference_mode():
        segmenter._compute(batch)
        wait()
        done, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            segmenter._compute(batch)
            wait()
            done += size
    return done / (time.perf_counter() - began)


def predicted(source: ModelSource, folder: Path, size: int) -> float:
    """Images per second of ``segbatch predict``, from the moment that the model is loaded."""
    with tempfile.TemporaryDirectory() as out:
        options = RunOptions(engine=EngineConfig(kind="inline"), plan=PlanConfig(shard_rows=512))
        result = segbatch.predict(source, str(folder), f"{out}/masks", batch_size=size, options=options)
    return result.rows / result.seconds


def drawn(folder: Path, count: int) -> Path:
    """Photos of 640 x 480 and 480 x 640, as noisy as photos are."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = ((480, 640), (640, 480))[number % 2]
        pixels = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        (folder / f"{number:05d}.png").write_bytes(png.encode_rgb(pixels))
    return folder


def labels(predictor: Predictor, prepared: list[Prepared]) -> list[NDArray[Any]]:
    found = [predictor.finish(raw).semantic for raw in predictor.forward(prepared)]
    return [label_map for label_map in found if label_map is not None]


def measured(source: ModelSource, way: Way, folder: Path, arguments: argparse.Namespace) -> list[NDArray[Any]]:
    """One line of the table; gives the label maps of some photos."""
    segmenter = OnGpu(source, way, arguments.fake).load(1)
    if not isinstance(segmenter, gpu.GpuSegmenter):
        raise SystemExit(f"{source.reference}: only semantic networks of torch have a GPU path that is measured here")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:8]
    one = Predictor(segmenter, 1)
    images = [photo.upright(rgb, info.exif_orientation) for rgb, info in (photo.decode(p.read_bytes()) for p in paths)]
    prepared = [one.prepare(image) for image in images]
    size = gpu.best_batch_size(segmenter, prepared[0].tensor, 2 if arguments.fake else 64)
    way = Way(way.name, way.dtype, way.engine, size, way.channels_last, way.device)
    predictor = Predictor(OnGpu(source, way, arguments.fake).load(1), size)
    batch = [p for p, _ in zip(itertools.cycle(prepared[:1]), range(size), strict=False)]
    rate(lambda: len(labels(predictor, batch)), 0.5)  # compiles, records
    sampler = gpu.GpuSampler()
    network = rate(lambda: len(labels(predictor, batch)), arguments.seconds)
    use = sampler.stop()
    alone = bare(segmenter, prepared[0], size, arguments.seconds / 2, arguments.fake)
    whole = predicted(OnGpu(source, way, arguments.fake), folder, size)
    busy = f"{100 * use.busy:.0f} %, {use.memory_bytes / 2**30:.1f} GiB" if use else "not known"
    print(f"{way.name:38s} {size:5d} {alone:9.1f} {network:9.1f} {whole:9.1f}   {busy}", end="", flush=True)
    return labels(Predictor(segmenter, 1), prepared)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--photos", type=int, default=1024)
    parser.add_argument("--fake", action="store_true")
    arguments = parser.parse_args()
    if not arguments.fake and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --fake goes through it all the same")
    source = compose.source(arguments.model) if arguments.model else RandomUNet(arguments.width, arguments.side)
    print(f"{source.reference} on {'the CPU, as if it were a GPU' if arguments.fake else torch.cuda.get_device_name()}")
    print(f"{'images/s':38s} {'batch':>5s} {'bare':>9s} {'network':>9s} {'predict':>9s}   utilisation, agreement")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or drawn(Path(scratch), arguments.photos)
        first: list[NDArray[Any]] = []
        for way in WAYS:
            if arguments.fake and way.engine == "inductor":
                continue
            found = measured(source, way, folder, arguments)
            first = first or found
            same = sum(int((a == b).sum()) for a, b in zip(found, first, strict=True))
            print(f", {100 * same / sum(a.size for a in first):.2f} %")


if __name__ == "__main__":
    main()
