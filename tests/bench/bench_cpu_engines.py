"""Every way of computing on a CPU, on one thread: torch in float32, autocast, torch.compile, OpenVINO.

Images per CPU second of the network, how much of the labels agree, and CPU seconds from the loaded network to the first
result. Agreement means nothing for the networks here, whose weights are random; ``--model`` takes a trained one.

    python tests/bench/bench_cpu_engines.py PHOTOS [--only fcn] [--inductor] [--model unet@OUT]
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from bench_models import built
from numpy.typing import NDArray

from segbatch.codecs import photo
from segbatch.config import ExecutionConfig
from segbatch.inference import execution
from segbatch.models import registry
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.network import TorchSegmenter
from segbatch.records import ClassInfo, ClassTable

CLASSES = ClassTable(tuple(ClassInfo(i, f"class {i}", isthing=i % 2 == 1) for i in range(21)))
WAYS = (("openvino", "float32"), ("eager", "bfloat16"), ("openvino", "bfloat16"))


class _Named(torch.nn.Module):
    """The tensor that a network of another library gives under a name."""

    def __init__(self, net: torch.nn.Module, argument: str, name: str) -> None:
        super().__init__()
        self.net, self._argument, self._name = net, argument, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.net(**{self._argument: x})[self._name]
        return scores


def _semantic(name: str, net: torch.nn.Module, classes: ClassTable = CLASSES) -> Segmenter:
    spec = ModelSpec(name, "semantic", classes, InputSpec(divisor=32), "logits", f"bench-{name}")
    return TorchSegmenter(net, spec)


def fcn() -> Segmenter:
    from torchvision.models.segmentation import fcn_resnet50

    net = fcn_resnet50(weights=None, weights_backbone=None, num_classes=21)
    return _semantic("fcn", _Named(net, "x", "out"))


def segformer() -> Segmenter:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=21))
    return _semantic("segformer", _Named(net, "pixel_values", "logits"))


def _own(name: str, **options: Any) -> Segmenter:
    architecture = ARCHITECTURES[name]
    spec = ModelSpec(
        name=name,
        task=architecture.task,
        classes=CLASSES,
        input=architecture.input_spec(architecture.config(**options)),
        output=architecture.output,
        digest=f"bench-{name}",
        choice=architecture.choice,
    )
    return architecture.segmenter(built(name, options), spec)


NETS: dict[str, tuple[Callable[[], Segmenter], tuple[int, int]]] = {
    "fcn": (fcn, (320, 320)),
    "deeplab": (lambda: _own("deeplab", backbone="resnet50"), (320, 320)),
    "segformer": (segformer, (512, 1024)),
    "unet": (lambda: _own("unet", width=64), (320, 320)),
    "maskrcnn": (lambda: _own("maskrcnn"), (480, 640)),
    "panoptic_fpn": (lambda: _own("panoptic_fpn"), (480, 640)),
    "instancefcn": (lambda: _own("instancefcn"), (160, 192)),
}


def photos_of(folder: Path, size: tuple[int, int] | None) -> list[NDArray[np.uint8]]:
    """Some photos of a folder, in one size where that is given."""
    paths = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    found = [photo.decode(p.read_bytes(), str(p))[0] for p in itertools.islice(paths, 4)]
    return [cv2.resize(p, size[::-1], interpolation=cv2.INTER_AREA) for p in found] if size else found


def report(name: str, segmenter: Segmenter, photos: list[NDArray[np.uint8]], ways: list[tuple[str, str]]) -> None:
    """A line for each way."""
    base = 0.0
    for engine, dtype in ways:
        wanted = ExecutionConfig(engine=engine, dtype=dtype, min_agreement=0.0)
        began = time.process_time()
        found = execution.decide(segmenter, photos, 10**6, wanted)
        spent = time.process_time() - began
        plain = found.trials[0]
        if not base:
            base = plain.seconds
            print(f"{name:14} eager float32       {1 / base:7.2f} images a CPU second")
        for trial in found.trials[1:]:
            speed = f"{1 / trial.seconds:7.2f} {plain.seconds / trial.seconds:5.2f} x" if not trial.failed else "failed"
            agrees = trial.failed or ("" if trial.agreement is None else f"{100 * trial.agreement:.2f} %")
            print(f"{name:14} {trial.name:19} {speed}   {agrees}   (decided in {spent:.1f} CPU s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--model", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = [*WAYS, *([("inductor", "bfloat16")] if arguments.inductor else [])]
    if arguments.model:
        report("model", registry.source(arguments.model).load(1), photos_of(arguments.photos, None), ways)
        return
    for name, (make, size) in NETS.items():
        if arguments.only in ("", name):
            torch.manual_seed(0)
            report(name, make(), photos_of(arguments.photos, size), ways)


if __name__ == "__main__":
    main()
