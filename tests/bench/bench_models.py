"""Size and speed of every built-in network in its paper's form: makes ``segbatch/models/catalogue.json``.

python tests/bench/bench_models.py [--seconds 10] [--only NAME]
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segbatch.inference.pipeline import Predictor
from segbatch.models import catalogue
from segbatch.models.architectures import ARCHITECTURES
from segbatch.models.base import ModelSpec
from segbatch.models.catalogue import Card
from segbatch.records import ClassInfo, ClassTable

TARGET = Path(catalogue.__file__).with_name("catalogue.json")
CLASSES = 21
FORMS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("unet", {"width": 64}, (320, 320)),
    ("unet", {"encoder": "efficientnet_lite0", "pretrained": False}, (320, 320)),
    ("unet_valid", {"channels": 1}, (320, 320)),
    ("fcn", {"stride": 32}, (320, 320)),
    ("fcn", {"stride": 16}, (320, 320)),
    ("fcn", {"stride": 8}, (320, 320)),
    ("segnet", {}, (320, 320)),
    ("segnet", {"variant": "basic"}, (320, 320)),
    ("deeplab", {}, (320, 320)),
    ("deeplab", {"output_stride": 8}, (320, 320)),
    ("deeplab", {"backbone": "resnet50"}, (320, 320)),
    ("deeplab", {"backbone": "resnet101"}, (320, 320)),
    ("patch", {}, (64, 64)),
    ("maskrcnn", {}, (320, 320)),
    ("maskrcnn", {"head": "c4"}, (320, 320)),
    ("instancefcn", {}, (320, 320)),
    ("panoptic_fpn", {}, (320, 320)),
    ("color", {}, (320, 320)),
]


def table() -> ClassTable:
    """Things and stuff in turn."""
    return ClassTable(tuple(ClassInfo(i, f"class {i}", isthing=i % 2 == 1) for i in range(CLASSES)))


def built(name: str, options: dict[str, Any]) -> torch.nn.Module:
    """The network with random weights, for so many classes."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    return architecture.build(architecture.config(**options), table())


def measured(name: str, options: dict[str, Any], size: tuple[int, int], seconds: float) -> Card:
    """Build it, count its parameters, run it for so long."""
    architecture, net = ARCHITECTURES[name], built(name, options)
    spec = ModelSpec(
        name=name,
        task=architecture.task,
        classes=table(),
        input=architecture.input_spec(architecture.config(**options)),
        output=architecture.output,
        digest="",
        choice=architecture.choice,
    )
    predictor = Predictor(architecture.segmenter(net, spec), 1)
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    predictor.predict(photo)
    runs, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        predictor.predict(photo)
        runs += 1
    speed = runs / (time.perf_counter() - began)
    parameters = sum(p.numel() for p in net.parameters())
    return Card(name, options, CLASSES, parameters, *size, round(speed, 3 if speed < 1 else 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cards = {} if not TARGET.exists() else {(c.architecture, c.form): c for c in catalogue.cards()}
    for name, options, size in FORMS:
        if arguments.only in ("", name):
            card = measured(name, options, size, arguments.seconds)
            cards[name, card.form] = card
            print(f"{name:14} {card.form:40} {card.parameters:12,} {card.images_per_s:9} images/s", file=sys.stderr)
    known = [(name, Card(name, options, 0, 0, 0, 0, 0.0).form) for name, options, _ in FORMS]
    content = {
        "machine": f"one core, {torch.backends.cpu.get_cpu_capability()}, float32, torch {torch.__version__}",
        "cards": [asdict(cards[key]) for key in known if key in cards],
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
