"""Decoding: JPEGs whole against reduced, PNGs by every decoder at hand, and what reducing does to the labels.

JPEG: CPU time of decoding and resizing to what a network of N x N is fed, and the mean difference of what it is fed
in grey levels. PNG: CPU time to RGB pixels, each decoder's pixels compared with Pillow's; pyspng takes part where it is
installed. With a model, the labels of whole and reduced photos are compared, pixel by pixel.

    python tests/bench/bench_decode.py FOLDER [--fed 256] [--images 40] [--model MODEL]
"""

import argparse
import functools
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segbatch.codecs import photo, png
from segbatch.inference import compose
from segbatch.inference.pipeline import Predictor, fed_size, stretched
from segbatch.models.base import InputSpec
from segbatch.stages.inputs import Fed, Input, decoded, fed_of, on_the_photo

_MAX_PIXELS = 200_000_000


def cpu_ms(work: Callable[[bytes], Any], files: Sequence[bytes], rounds: int = 3) -> float:
    """The least CPU milliseconds a file of some rounds."""
    work(files[0])
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        for data in files:
            work(data)
        spent.append((time.process_time() - began) / len(files) * 1000)
    return min(spent)


def fed_pixels(data: bytes, spec: InputSpec, fed: Fed | None) -> NDArray[Any]:
    """What a network is fed, before it is normalised."""
    pixels, *_ = decoded(Input("", None, "", ""), data, _MAX_PIXELS, fed)
    return stretched(pixels, *fed_size(spec, *pixels.shape[:2]))


def jpegs(files: Sequence[bytes], side: int) -> None:
    """Whole against reduced, by the reduction that each photo gets."""
    spec = InputSpec(side, side, "stretch")
    fed = fed_of(spec)
    groups: dict[int, list[bytes]] = {}
    for data in files:
        info = photo.probe(data)
        groups.setdefault(photo.reduction(data, info, (2 * side, 2 * side)), []).append(data)
    for by, members in sorted(groups.items()):
        whole = cpu_ms(functools.partial(fed_pixels, spec=spec, fed=None), members)
        ours = cpu_ms(functools.partial(fed_pixels, spec=spec, fed=fed), members)
        pairs = [(fed_pixels(d, spec, None).astype(int), fed_pixels(d, spec, fed).astype(int)) for d in members]
        apart = statistics.mean(float(np.abs(a - b).mean()) for a, b in pairs)
        print(f"jpeg 1/{by}: {len(members):3d} photos, whole {whole:6.2f} ms, reduced {ours:6.2f} ms", end="")
        print(f" ({whole / ours:.2f} x), mean difference {apart:.2f} grey levels")


def pngs(files: Sequence[bytes]) -> None:
    """Every decoder on the same files."""
    decoders: dict[str, Callable[[bytes], Any]] = {
        "segbatch, checked": lambda d: photo.decode(d)[0],
        "decode_rgb (zlib-ng)": png.decode_rgb,
        "OpenCV": lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR_RGB),
        "Pillow": _by_pillow,
    }
    if importlib.util.find_spec("pyspng"):
        import pyspng

        decoders["pyspng"] = lambda d: pyspng.load(d, "RGB")
    wanted = [_by_pillow(d) for d in files]
    for name, decoder in decoders.items():
        found = [decoder(d) for d in files]
        same = sum(f is not None and np.array_equal(f, w) for f, w in zip(found, wanted, strict=True))
        print(f"png {name:22s} {cpu_ms(decoder, files):7.2f} ms   equal to Pillow {same} of {len(files)}")


def _by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def labels(files: Sequence[bytes], reference: str) -> None:
    """How many pixels have the same label when photos are reduced."""
    predictor = Predictor(compose.source(reference).load(1), 1)
    fed = fed_of(predictor.spec.input)
    print(f"{reference} is fed {predictor.spec.input.height} x {predictor.spec.input.width}", end=" ")
    print(f"({predictor.spec.input.resize})" if fed else "every pixel: nothing to reduce")
    shares = []
    for data in files:
        info = photo.probe(data)
        if (
            fed is None
            or decoded(Input("", None, "", ""), data, _MAX_PIXELS, fed)[0].size == 3 * info.height * info.width
        ):
            continue
        maps = [_labels(predictor, data, f) for f in (None, fed)]
        shares.append(float((maps[0] == maps[1]).mean()))
    if shares:
        print(
            f"{len(shares)} of {len(files)} photos reduced: {100 * statistics.mean(shares):.2f} % of pixels agree",
            end="",
        )
        print(f", worst photo {100 * min(shares):.2f} %")
    else:
        print("no photo is large enough to be reduced")


def _labels(predictor: Predictor, data: bytes, fed: Fed | None) -> NDArray[np.uint16]:
    pixels, height, width, orientation = decoded(Input("", None, "", ""), data, _MAX_PIXELS, fed)
    prepared = on_the_photo(predictor.prepare(pixels), height, width, orientation)
    found = predictor.finish(predictor.forward([prepared])[0]).semantic
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fed", type=int, default=256)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--model", default="")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    paths = [p for p in sorted(arguments.folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    files = [p.read_bytes() for p in paths[: arguments.images]]
    by_format: dict[str, list[bytes]] = {}
    for data in files:
        by_format.setdefault(photo.probe(data).format, []).append(data)
    if "jpeg" in by_format:
        jpegs(by_format["jpeg"], arguments.fed)
    if "png" in by_format:
        pngs(by_format["png"])
    if arguments.model:
        labels(files, arguments.model)


if __name__ == "__main__":
    main()
