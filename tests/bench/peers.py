"""Four ways to segment a folder of photos, side by side in one run: speed, memory, and what is left after trouble.

- ``loop``: a torch DataLoader that decodes in worker processes, the network in the main one, a PNG mask per photo.
- ``ray data``: the documented recipe for batch inference: ``read_images`` -> ``map_batches`` with an actor class ->
  ``write_parquet`` (docs.ray.io, "Working with Images" and "End-to-end: Offline Batch Inference").
- ``pipeline``: ``transformers.pipeline("image-segmentation")`` over a generator of paths, a PNG mask per photo.
- ``segbatch``: ``segbatch predict hf:FOLDER PHOTOS OUT``.

All run the same network, a SegFormer-B0 of random weights, on the same photos at the same input size, each with its
documented defaults for this machine's cores; each is a process of its own, watched from outside:

- images/s: from the moment that the model is loaded and work begins until the last result is written.
- CPU s: user and system time of the process and all that it started, from twice a second of looking; an image: of the
  time from which images/s counts.
- peak memory: proportional set size (what is shared counts once) of the same processes together.

Trouble is made on fewer photos: one JPEG of noise among them; a worker killed with SIGKILL when half of the photos have
been through the model, then the driver in another run; each time the same command is given again until it succeeds.
``redone`` counts photos that went through the model more than once, ``twice`` rows that the output holds twice.

    python tests/bench/peers.py [--photos 2000] [--trouble 64] [--size 256] [--data FOLDER] [--only NAME ...]
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

ORIGINAL = Path(os.environ.get("SEGBATCH_TEST_DATA", Path(__file__).resolve().parents[3] / "shared")) / "data"
REAL = ("coco_tiny/train2017", "camvid/val")
SUFFIXES = (".jpg", ".png")
CLASSES = 21
BATCH = 8
LOOK_S = 0.5
ATTEMPTS = 3
WORK_LIMIT_S = 3600.0
PEERS = ("loop", "ray data", "pipeline", "segbatch")
CHILD = "a child"
WORKERS = {"loop": CHILD, "ray data": "MapWorker", "segbatch": "ray::Actor"}
"""What the name of a peer's worker process holds; the pipeline has no workers."""


# -- the peers, each run in a process of its own -------------------------------------------------------------------


class Clock:
    """Notes when work begins and how many photos the model has seen, in files that outlive the process."""

    def __init__(self, out: Path) -> None:
        self._began, self._ended, self._seen = (out.with_suffix(s) for s in (".began", ".ended", ".seen"))

    def begin(self) -> None:
        """The model is loaded; only the first call counts."""
        with contextlib.suppress(FileExistsError), self._began.open("x") as file:
            file.write(repr(time.time()))

    def end(self) -> None:
        """The last result is written."""
        self._ended.write_text(repr(time.time()))

    @property
    def runs(self) -> bool:
        """Whether work has begun."""
        return self._began.exists()

    def saw(self, photos: int) -> None:
        """So many photos have been through the model."""
        with self._seen.open("ab") as file:
            file.write(b"." * photos)

    def seen(self) -> int:
        """Photos that the model has seen in all attempts."""
        return self._seen.stat().st_size if self._seen.exists() else 0

    @property
    def seconds(self) -> float:
        """From the one to the other."""
        return float(self._ended.read_text()) - float(self._began.read_text())


def make_model(folder: Path, size: int) -> None:
    """A SegFormer-B0 of random weights with its image processor, as ``save_pretrained`` writes them."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(CLASSES)}
    config = hf.SegformerConfig(id2label=names, label2id={n: i for i, n in names.items()})
    hf.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    hf.SegformerImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


def loaded(model: Path) -> tuple[Any, Any]:
    """The network and its image processor."""
    import transformers as hf

    network: Any = hf.SegformerForSemanticSegmentation.from_pretrained(model)
    return network.eval(), hf.SegformerImageProcessor.from_pretrained(model)


def label_maps(network: Any, processor: Any, pixels: Any, sizes: list[tuple[int, int]]) -> list[Any]:
    """One (height, width) label map a photo."""
    import torch

    with torch.inference_mode():
        output = network(pixel_values=pixels)
    found = processor.post_process_semantic_segmentation(output, target_sizes=sizes)
    return [labels.numpy().astype(np.uint8) for labels in found]


def run_loop(photos: Path, model: Path, out: Path) -> None:
    """A torch DataLoader, the network, a PNG a photo."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network, processor = loaded(model)
    clock = Clock(out)
    out.mkdir(exist_ok=True)

    class Photos(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted(photos.iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            image = Image.open(self.paths[index]).convert("RGB")
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            return pixels, (image.height, image.width), self.paths[index].stem

    def collate(items: list[Any]) -> Any:
        pixels, sizes, names = zip(*items, strict=True)
        return torch.stack(pixels), list(sizes), names

    workers = os.cpu_count() or 1
    clock.begin()
    for pixels, sizes, names in DataLoader(Photos(), BATCH, num_workers=workers, collate_fn=collate):
        for name, labels in zip(names, label_maps(network, processor, pixels, sizes), strict=True):
            Image.fromarray(labels).save(out / f"{name}.png")
        clock.saw(len(names))


class RaySegmenter:
    """The actor class of the recipe."""

    def __init__(self, model: str, out: str) -> None:
        self._network, self._processor = loaded(Path(model))
        self._clock = Clock(Path(out))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        self._clock.begin()
        images = list(batch["image"])
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        sizes = [i.shape[:2] for i in images]
        masks = []
        for labels in label_maps(self._network, self._processor, pixels, sizes):
            buffer = io.BytesIO()
            Image.fromarray(labels).save(buffer, "PNG")
            masks.append(buffer.getvalue())
        self._clock.saw(len(images))
        return {"path": batch["path"], "mask": np.array(masks, object)}


def run_ray_data(photos: Path, model: Path, out: Path) -> None:
    """read_images -> map_batches -> write_parquet."""
    import ray
    from ray.data import ActorPoolStrategy

    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    found = ray.data.read_images(str(photos), include_paths=True, mode="RGB")
    made = found.map_batches(
        RaySegmenter,
        batch_size=BATCH,
        fn_constructor_args=(str(model), str(out)),
        compute=ActorPoolStrategy(min_size=1, max_size=max((os.cpu_count() or 2) - 1, 1)),
        num_cpus=1,
    )
    made.write_parquet(str(out))


def run_pipeline(photos: Path, model: Path, out: Path) -> None:
    """transformers.pipeline over a generator of paths."""
    import transformers as hf
    from PIL import Image

    segment: Any = hf.pipeline("image-segmentation", model=str(model))
    clock = Clock(out)
    out.mkdir(exist_ok=True)
    paths = sorted(photos.iterdir())
    clock.begin()
    for path, segments in zip(paths, segment((str(p) for p in paths), batch_size=BATCH), strict=True):
        labels = np.zeros(np.shape(segments[0]["mask"]), np.uint8)
        for segment_of in segments:
            labels[np.asarray(segment_of["mask"]) > 0] = segment.model.config.label2id[segment_of["label"]]
        Image.fromarray(labels).save(out / f"{path.stem}.png")
        clock.saw(1)


def run_segbatch(photos: Path, model: Path, out: Path) -> None:
    """``segbatch predict``; where trouble is made, its model is one that counts."""
    from segbatch import api, jobs
    from segbatch.models import registry

    clock = Clock(out)

    class Start(jobs.Silent):
        def begin(self, what: str, total: int, unit: str = "images") -> None:
            clock.begin()

    source = registry.source(f"hf:{model}")
    from peers import Counting  # the actors cannot import __main__

    counted: Any = Counting(source, str(out)) if os.environ.get("PEERS_COUNT") else source
    api.predict(counted, str(photos), str(out), limits=jobs.Limits(1.0), watch=Start())


@dataclasses.dataclass(frozen=True)
class Counting:
    """A ``ModelSource`` that notes the photos that its network has seen; of the same reference and digest."""

    inner: Any
    out: str

    @property
    def reference(self) -> str:
        """The inner one's."""
        return str(self.inner.reference)

    def describe(self) -> Any:
        """The inner one's."""
        return self.inner.describe()

    def load(self, threads: int) -> "CountingSegmenter":
        """The inner network, watched."""
        return CountingSegmenter(self.inner.load(threads), Clock(Path(self.out)))


class CountingSegmenter:
    """See ``Counting``."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.spec = inner.spec
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:  # its own pre- and post-processing
        return getattr(self._inner, name)

    def forward(self, batch: Any) -> Any:
        """The inner one's."""
        self._clock.begin()
        result = self._inner.forward(batch)
        self._clock.saw(len(batch))
        return result


RUNS: dict[str, Callable[[Path, Path, Path], None]] = {
    "loop": run_loop,
    "ray data": run_ray_data,
    "pipeline": run_pipeline,
    "segbatch": run_segbatch,
}


# -- what they left ------------------------------------------------------------------------------------------------


def rows_of(peer: str, out: Path) -> Counter[str]:
    """How often the output holds a mask of each photo, by the photo's stem."""
    import pyarrow.dataset as ds
    from PIL import Image

    if peer == "segbatch":
        if not (out / "masks").exists():
            return Counter()
        table = ds.dataset(str(out / "masks"), format="parquet").to_table(["sample_id", "status"])
        pairs = zip(table["sample_id"].to_pylist(), table["status"].to_pylist(), strict=True)
        return Counter(Path(i).stem for i, status in pairs if status == "ok")
    if peer == "ray data":
        files = [str(p) for p in out.rglob("*.parquet")] if out.exists() else []
        paths = ds.dataset(files, format="parquet").to_table(["path"])["path"].to_pylist() if files else []
        return Counter(Path(p).stem for p in paths)
    found: Counter[str] = Counter()
    for path in out.glob("*.png") if out.exists() else ():
        with contextlib.suppress(OSError, SyntaxError):  # cut off by a kill: no mask
            Image.open(path).load()
            found[path.stem] += 1
    return found


def bytes_in(out: Path) -> int:
    """Bytes of all files below the output."""
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


# -- watching a process and all that it starts ---------------------------------------------------------------------


@dataclasses.dataclass
class Ran:
    """What one attempt took."""

    code: int
    wall: float
    cpu: float
    start_cpu: float
    peak: int
    killed: bool


class Watched:
    """A peer's process, looked at every half second; ``half_way`` is called once when half is through the model."""

    def __init__(self, peer: str, photos: Path, model: Path, out: Path, count: bool) -> None:
        command = [sys.executable, __file__, "--peer", peer, str(photos), str(model), str(out)]
        environment = {**os.environ, "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("PEERS_COUNT", None)
        beside = (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, beside))
        if count:
            environment["PEERS_COUNT"] = "1"
        self.log = out.with_suffix(".log")
        self._began = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._root = psutil.Process(self.process.pid)
        self.tree: dict[int, psutil.Process] = {self.process.pid: self._root}
        self._cpu: dict[int, float] = {}
        self._clock, self._start_cpu = Clock(out), 0.0
        self._peak = 0
        self._killed = False

    def wait(self, limit_s: float, half_way: Callable[[], bool] | None = None, kill: str = "") -> Ran:
        """Until it ends; when ``half_way`` says so, one worker or the driver is killed.

        Returns what it took. Whatever it started and left running is killed.
        """
        until = time.monotonic() + limit_s
        next_look = 0.0
        while self.process.poll() is None:
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + LOOK_S
            if half_way is not None and half_way():
                self._killed, half_way = self._kill(kill), None
            if time.monotonic() > until:
                self.process.kill()
            time.sleep(0.05)
        wall = time.time() - self._began
        for process in self.tree.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return Ran(self.process.returncode, wall, sum(self._cpu.values()), self._start_cpu, self._peak, self._killed)

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.tree.update({p.pid: p for p in self._root.children(recursive=True)})
        memory = 0
        for pid, process in self.tree.items():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                self._cpu[pid] = times.user + times.system
                memory += process.memory_full_info().pss
        self._peak = max(self._peak, memory)
        if not self._clock.runs:
            self._start_cpu = sum(self._cpu.values())

    def _kill(self, kill: str) -> bool:
        """Whether one was found."""
        self._look()
        if kill == "driver":
            self.process.send_signal(signal.SIGKILL)
            return True
        for process in self.tree.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child = kill == CHILD and process.ppid() == self.process.pid
                if child or any(kill in text for text in (process.name(), *process.cmdline())):
                    process.kill()
                    return True
        return False


SPEED = ["", "images/s", "wall s", "of it start-up", "CPU s", "CPU ms an image", "peak memory, MB", "MB written"]
TROUBLE = ["", "one corrupt JPEG", "kill -9 of a worker half way", "kill -9 of the driver half way"]


# -- the two tables ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """Where a peer works."""

    peer: str
    photos: Path
    model: Path
    out: Path

    def attempt(self, count: bool, half_way: Callable[[], bool] | None = None, kill: str = "") -> Ran:
        """The command, once."""
        return Watched(self.peer, self.photos, self.model, self.out, count).wait(WORK_LIMIT_S, half_way, kill)

    def said(self) -> str:
        """The last line that the peer wrote, for an error."""
        lines = self.out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def speed_row(case: Case) -> list[str]:
    """Speed and cost over good photos."""
    count = sum(1 for _ in case.photos.iterdir())
    ran = case.attempt(count=False)
    if ran.code:
        return [case.peer, f"failed: {case.said()}", *[""] * 6]
    seconds = Clock(case.out).seconds
    masks = rows_of(case.peer, case.out)
    assert len(masks) == masks.total() == count, f"{case.peer}: {masks.total()} masks of {count} photos"
    cells = (count / seconds, ran.wall, ran.wall - seconds, ran.cpu, 1000 * (ran.cpu - ran.start_cpu) / count)
    shown = [f"{cells[0]:.1f}", *(f"{c:.0f}" for c in cells[1:])]
    return [case.peer, *shown, f"{ran.peak / 1e6:,.0f}", f"{bytes_in(case.out) / 1e6:.2f}"]


def trouble_row(peer: str, photos: Path, broken: Path, model: Path, scratch: Path) -> list[str]:
    """What one corrupt file and two kills leave behind."""
    name = peer.replace(" ", "-")
    corrupt = Case(peer, broken, model, scratch / f"{name}-corrupt")
    ran = corrupt.attempt(count=True)
    good = sum(1 for _ in broken.iterdir()) - 1
    masks = rows_of(peer, corrupt.out)
    ended = "goes on" if ran.code == 0 else "ends with an error"
    cells = [peer, f"{ended}; {len(masks)} of {good} good photos have a mask"]
    for kill in (WORKERS.get(peer, ""), "driver"):
        cells.append(
            _killed(Case(peer, photos, model, scratch / f"{name}-{'driver' if kill == 'driver' else 'worker'}"), kill)
        )
    return cells


def _killed(case: Case, kill: str) -> str:
    if not kill:
        return "has none"
    count = sum(1 for _ in case.photos.iterdir())
    clock = Clock(case.out)
    first = case.attempt(True, lambda: clock.seen() >= count // 2, kill)
    if not first.killed:
        return "ended before its worker was found"
    after, runs, code = rows_of(case.peer, case.out), 1, first.code
    while code and runs < ATTEMPTS:
        code, runs = case.attempt(count=True).code, runs + 1
    masks = rows_of(case.peer, case.out)
    went = "goes on" if first.code == 0 else f"ends; {len(after)} masks kept"
    again = f", {runs - 1} more run" if runs > 1 else ""
    state = "" if code == 0 else ", never ends well"
    lost, twice = count - len(masks), masks.total() - len(masks)
    return f"{went}{again}{state}: {lost} lost, {twice} twice, {max(clock.seen() - count, 0)} of {count} redone"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Processor, cores and versions in one line."""
    model = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    names = ("segbatch", "torch", "transformers", "ray", "pyarrow", "pillow", "openvino")
    versions = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {', '.join(versions)}"


def _cpuinfo() -> Iterator[str]:
    with open("/proc/cpuinfo") as file:
        yield from file


def photo_folder(folder: Path, count: int, data: Path) -> Path:
    """``count`` photos: the real ones again and again under new names, or drawn ones where there are none."""
    folder.mkdir()
    real = sorted(p for name in REAL for p in (data / name).glob("*") if p.suffix in SUFFIXES)
    source = (p.read_bytes() for p in itertools.cycle(real)) if real else _drawn()
    suffixes = (p.suffix for p in itertools.cycle(real)) if real else itertools.repeat(".jpg")
    for number, data_of, suffix in zip(range(count), source, suffixes, strict=False):
        (folder / f"photo-{number:05d}{suffix}").write_bytes(data_of)
    return folder


def _with_a_broken_one(folder: Path) -> Path:
    """The photo in the middle is noise behind a JPEG's first bytes."""
    paths = sorted(folder.iterdir())
    for path in paths[len(paths) // 2 :][:1]:
        path.unlink()
        path.with_suffix(".jpg").write_bytes(b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(20_000))
    return folder


def _drawn() -> Iterator[bytes]:
    from PIL import Image

    for seed in itertools.count():
        small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--trouble", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--data", type=Path, default=ORIGINAL)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--peer", nargs=4, metavar=("NAME", "PHOTOS", "MODEL", "OUT"), help="one peer, in this process")
    arguments = parser.parse_args()
    if arguments.peer:
        name, *paths = arguments.peer
        RUNS[name](*map(Path, paths))
        Clock(Path(paths[-1])).end()
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        compare(Path(temporary), arguments)


def compare(scratch: Path, arguments: argparse.Namespace) -> None:
    """Both tables."""
    model = scratch / "model"
    make_model(model, arguments.size)
    photos = photo_folder(scratch / "photos", arguments.photos, arguments.data)
    few = photo_folder(scratch / "few", arguments.trouble, arguments.data)
    broken = _with_a_broken_one(photo_folder(scratch / "broken", arguments.trouble, arguments.data))
    speeds, troubles = [], []
    for peer in arguments.only:
        print(f"{peer} ...", file=sys.stderr, flush=True)
        if arguments.photos:
            speeds.append(speed_row(Case(peer, photos, model, scratch / peer.replace(" ", "-"))))
            print(table(SPEED, speeds[-1:]), file=sys.stderr, flush=True)
        if arguments.trouble:
            troubles.append(trouble_row(peer, few, broken, model, scratch))
            print(table(TROUBLE, troubles[-1:]), file=sys.stderr, flush=True)
    print(f"SegFormer-B0 of random weights at {arguments.size}x{arguments.size}; {machine()}")
    if speeds:
        print(f"\n{arguments.photos} photos:\n\n{table(SPEED, speeds)}")
    if troubles:
        print(f"\n{arguments.trouble} photos:\n\n{table(TROUBLE, troubles)}")


if __name__ == "__main__":
    main()
