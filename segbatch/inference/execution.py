"""The one place that decides how a model computes: device, number format, engine, memory format and batch size.

``decide`` runs some of the input's own photos through torch in float32 and through everything that could be faster,
drops what does not agree, and takes the fastest. ``apply`` makes a loaded ``Segmenter`` compute like that.

Timings are CPU seconds of one thread, for a worker computes with one thread for each of its codec threads. Networks
are kept channels last in memory: that was the faster one of the two for every network of ours that has convolutions.
"""

import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segbatch.codecs import rle
from segbatch.config import ExecutionConfig
from segbatch.errors import ConfigError, DataError
from segbatch.inference.pipeline import Predictor, Prepared, Raw, auto_batch_size
from segbatch.models.base import Segmenter
from segbatch.models.parts import parts_of
from segbatch.records import Prediction

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Engine = Literal["eager", "openvino", "inductor", "cudagraphs"]

MIN_PHOTOS = 64
"""For fewer photos nothing is measured, unless asked for: they are done before it has paid."""
MAX_CALIBRATION_PHOTOS = 8
_WORTH_S = 20.0
"""CPU seconds of work in float32 below which nothing is measured: it takes about 4, and saves half of them at best."""
_WORTH_COMPILING_S = 1200.0
"""Likewise below which torch.compile is not tried: 10 to 40 s for each shape, in each worker."""
_PASS_S = 0.8
"""CPU seconds that float32 may take over the photos: so many of them are looked at, but two at least."""
_PASSES = 3
_GPU_PHOTOS = 4
_MIN_SCORE = 0.5
_MIN_IOU = 0.5
_RUNNING = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, DataError)


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found out about one way of computing.

    Attributes:
        engine, dtype: the way.
        seconds: CPU seconds of the network for one photo, on one thread.
        agreement: see ``agreement``; None where there was nothing to compare.
        failed: why it could not be tried; empty otherwise.
    """

    engine: Engine
    dtype: Dtype
    seconds: float = 0.0
    agreement: float | None = None
    failed: str = ""

    @property
    def name(self) -> str:
        """``openvino bfloat16``."""
        return f"{self.engine} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Execution:
    """How a model computes, and how that was found.

    Attributes:
        device: where.
        dtype: number format of convolutions and matrix products.
        engine: what runs the network.
        channels_last: memory format.
        batch_size: photos per call of the network.
        threads: compute threads of one call.
        usual: shapes of the inputs of those parts of the network, by key, whose inputs were alike for all photos.
        agreement: with float32 in torch, 0..1; see ``agreement``. None where nothing was measured.
        speed_up: over float32 in torch.
        photos, pixels: on which that was measured.
        why: the reason, in a few words.
        trials: everything that was measured.
    """

    device: Device = "cpu"
    dtype: Dtype = "float32"
    engine: Engine = "eager"
    channels_last: bool = True
    batch_size: int = 1
    threads: int = 1
    usual: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()
    agreement: float | None = None
    speed_up: float = 1.0
    photos: int = 0
    pixels: int = 0
    why: str = ""
    trials: tuple[Trial, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether that is what torch does on a CPU by itself."""
        return self.device == "cpu" and self.engine == "eager" and self.dtype == "float32"

    @property
    def said(self) -> str:
        """One line for the user."""
        if not self.trials:
            return f"computing in {self.dtype} on the {self.device}: {self.why}"
        compared = f" ({self.why})" if self.why else ""
        if self.plain:
            return f"computing in float32 by torch{compared}"
        of = f"{self.pixels:,} pixels of {self.photos} photos"
        share = "" if self.agreement is None else f", agrees with float32 on {_percent(self.agreement)} of {of}"
        return f"computing in {self.dtype} by {self.engine}: {self.speed_up:.1f} times as fast{share}{compared}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Execution":
        """What ``to_json`` gave."""
        usual = tuple((key, tuple(tuple(s) for s in shapes)) for key, shapes in document["usual"])
        return cls(**{**document, "usual": usual, "trials": tuple(Trial(**t) for t in document["trials"])})


def bfloat16_instructions() -> bool:
    """Whether this machine's processor multiplies numbers in bfloat16 (AMX, AVX512-BF16, or BF16 of ARM)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            flags = next((v.split() for k, _, v in lines if k.strip() in ("flags", "Features")), [])
    except OSError:
        return False  # no Linux
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))


# -- applying --------------------------------------------------------------------------------------------------------


def apply(segmenter: Segmenter, execution: Execution, threads: int = 1) -> Segmenter:
    """Make a ``Segmenter``, loaded for one compute thread, compute as was decided.

    Args:
        segmenter: just loaded; it is changed.
        execution: of ``decide``, perhaps on another machine.
        threads: how many threads will call it at once.

    Raises:
        ConfigError: this machine lacks what was decided on another.
    """
    if execution.device == "cuda":
        from segbatch.inference import gpu

        return gpu.accelerated(segmenter, execution)
    if execution.plain:
        return segmenter
    if execution.dtype == "bfloat16" and not bfloat16_instructions():
        log.warning("this run computes in bfloat16, but the processor of this node cannot: float32 here")
        execution = replace(execution, dtype="float32")
    photo = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    from segbatch.inference.openvino_graphs import CannotConvertError

    try:
        _replaced(segmenter, execution, threads, lambda: Predictor(segmenter, 1).prepare(photo))
    except CannotConvertError as error:
        raise ConfigError(
            f"model {segmenter.spec.name}: this run computes by {execution.engine}, but {error}",
            "make the machines alike, or choose a new output and --dtype float32",
        ) from error
    return segmenter


def _replaced(segmenter: Segmenter, execution: Execution, threads: int, prepared: Callable[[], Prepared]) -> None:
    """Put other modules into the places of the network's parts.

    Raises:
        CannotConvertError: OpenVINO does not know how.
    """
    from segbatch.inference import engines, openvino_graphs

    parts = parts_of(segmenter)
    if execution.engine != "openvino":
        for part in parts:
            if execution.engine == "inductor":
                part.replace(engines.Compiled(part.module, execution.dtype))
            elif execution.dtype == "bfloat16":
                part.replace(engines.Autocast(part.module))
        return
    graphs = openvino_graphs.graphs_of(parts, _trial_runs(segmenter, prepared))
    numbers, usual = openvino_graphs.Numbers(execution.dtype, threads), dict(execution.usual)
    for part in parts:
        graph = graphs[part.key]
        otherwise = None if graph.any_size else part.module
        part.replace(openvino_graphs.OpenVinoPart(graph, numbers, usual.get(part.key), otherwise))


def _trial_runs(segmenter: Segmenter, prepared: Callable[[], Prepared]) -> Iterator[Callable[[], None]]:
    """What runs the network on inputs of two small sizes; and what runs it on one of the usual size, if it refuses."""
    spec = segmenter.spec.input
    tensor = prepared().tensor
    rows, columns = (1, 2) if spec.layout == "nchw" else (0, 1)
    if spec.resize not in ("stretch", "letterbox"):
        step = math.lcm(spec.divisor, 32)
        sides = [step * math.ceil(128 / step), step * (1 + math.ceil(128 / step))]

        def small() -> None:
            for height, width in itertools.permutations(sides):
                cut = tensor.take(range(height), rows, mode="wrap").take(range(width), columns, mode="wrap")
                segmenter.forward(np.ascontiguousarray(cut[None]))

        yield small
    yield lambda: _none(segmenter.forward(tensor[None]))


def _none(_: object) -> None:
    """Nothing of it is wanted."""


# -- deciding --------------------------------------------------------------------------------------------------------


def decide(
    segmenter: Segmenter,
    photos: Sequence[NDArray[Any]],
    total: int,
    wanted: ExecutionConfig | None = None,
    batch_size: int = 0,
) -> Execution:
    """Measure, and choose.

    Args:
        segmenter: loaded for one compute thread; it is as it was when this returns.
        photos: some of the input's, upright (height, width, 3) uint8, or CT slices.
        total: how many there are to do.
        wanted: see ``ExecutionConfig``.
        batch_size: photos per call; 0 picks it.

    Raises:
        ConfigError: what is wanted cannot be had here; or the model cannot be run at all.
    """
    return _Calibration(segmenter, photos, total, wanted or ExecutionConfig(), batch_size).result()


def gpu_there() -> bool:
    """Whether torch can use a GPU of this machine; torch is only asked where there is a driver's device file."""
    if not any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "dxg", "kfd")):
        return False
    import torch

    return torch.cuda.is_available()


def decide_on_gpu(
    load: Callable[[], Segmenter], photos: Sequence[NDArray[Any]], wanted: ExecutionConfig | None = None
) -> Execution:
    """The fastest number format on a GPU whose labels agree with those of float32 on the CPU.

    Args:
        load: loads the model, anew for each format: its network moves to the GPU.
        photos: see ``decide``.
        wanted: see ``ExecutionConfig``.

    Raises:
        ConfigError: a model that torch does not run, an engine of the CPU, or no format that agrees.
    """
    from segbatch.inference import gpu

    wanted = wanted or ExecutionConfig()
    formats: tuple[Dtype, ...] = ("float16", "bfloat16", "float32")
    said = [d for d in formats if wanted.dtype in ("auto", d)]
    if wanted.engine == "openvino":
        raise ConfigError("OpenVINO computes on the CPU alone", "leave --device at cpu")
    engine: Engine = "eager" if wanted.engine == "auto" else wanted.engine
    plain = Predictor(load(), 1)
    reference = [plain.predict(photo) for photo in photos[:_GPU_PHOTOS]]
    trials: list[Trial] = []
    pixels = 0
    for dtype in said:
        way = Execution(device="cuda", dtype=dtype, engine=engine)
        predictor = Predictor(gpu.accelerated(load(), way), 1)
        prepared = [predictor.prepare(photo) for photo in photos[:_GPU_PHOTOS]]
        found = [predictor.finish(r) for r in predictor.forward(prepared)]
        counts = [agreement(a, b) for a, b in zip(reference, found, strict=True)]
        pixels = sum(c.pixels for c in counts)
        same = sum(c.same for c in counts) / pixels if pixels else None
        run = functools.partial(predictor.forward, prepared)
        trials.append(Trial(engine, dtype, _seconds(run, time.perf_counter) / len(prepared), same))
    good = [t for t in trials if t.dtype == "float32" or (t.agreement or 0.0) >= wanted.min_agreement]
    if not good:
        share = max(t.agreement or 0.0 for t in trials)
        raise ConfigError(
            f"{wanted.dtype} agrees with float32 on {_percent(share)} of pixels, less than "
            f"{100 * wanted.min_agreement:g} %",
            "leave --dtype at auto, or lower --min-agreement",
        )
    best, slowest = min(good, key=lambda t: t.seconds), trials[-1]
    chosen = gpu.accelerated(load(), Execution(device="cuda", dtype=best.dtype, engine=engine))
    image = Predictor(chosen, 1).prepare(photos[0]).tensor
    return Execution(
        device="cuda",
        dtype=best.dtype,
        engine=engine,
        batch_size=gpu.best_batch_size(chosen, image) if isinstance(chosen, gpu.GpuSegmenter) else 1,
        agreement=best.agreement,
        speed_up=slowest.seconds / best.seconds,
        photos=len(reference),
        pixels=pixels,
        trials=tuple(trials),
    )


class Agreement(NamedTuple):
    """How much of a prediction agrees with another: ``same`` of ``pixels``."""

    same: int
    pixels: int


def agreement(ours: Prediction, theirs: Prediction) -> Agreement:
    """How far two predictions of one photo agree.

    Label maps and panoptic maps: pixels of the same class. Detections: those with a score of .5 or more are matched,
    one to one, where class and more than half of the union agree, best first; the pixels of the intersections of
    matched masks, of the pixels of their unions and of all masks without a match.
    """
    if ours.instances is not None and theirs.instances is not None:
        return _of_masks(ours, theirs)
    a, b = (_classes(p) for p in (ours, theirs))
    return Agreement(int(np.count_nonzero(a == b)), a.size)


def _classes(prediction: Prediction) -> NDArray[np.uint16]:
    if prediction.panoptic is None:
        assert prediction.semantic is not None
        return prediction.semantic
    ids = np.array([0, *(s.category_id + 1 for s in prediction.segments or ())], np.uint16)
    classes: NDArray[np.uint16] = ids[prediction.panoptic]
    return classes


def _of_masks(ours: Prediction, theirs: Prediction) -> Agreement:
    first, second = (
        [i for i in p.instances or () if (i.score or 0.0) >= _MIN_SCORE and i.area] for p in (ours, theirs)
    )
    areas = [[int(rle.area(i.counts)) for i in found] for found in (first, second)]
    if not first or not second:
        return Agreement(0, sum(areas[0]) + sum(areas[1]))
    shared = rle.intersection_areas([i.counts for i in first], [i.counts for i in second]).astype(np.int64)
    unions = np.add.outer(areas[0], areas[1]) - shared
    alike = np.equal.outer([i.category_id for i in first], [i.category_id for i in second])
    overlap = np.where(alike, shared / np.maximum(unions, 1), 0.0)
    same, pixels = 0, sum(areas[0]) + sum(areas[1])
    while overlap.max() > _MIN_IOU:
        row, column = np.unravel_index(int(overlap.argmax()), overlap.shape)
        same += int(shared[row, column])
        pixels -= int(shared[row, column])
        overlap[row], overlap[:, column] = 0.0, 0.0
    return Agreement(same, pixels)


class _Calibration:
    """One decision in the making; arguments as ``decide``."""

    def __init__(
        self,
        segmenter: Segmenter,
        photos: Sequence[NDArray[Any]],
        total: int,
        wanted: ExecutionConfig,
        batch_size: int,
    ) -> None:

        self._segmenter, self._total, self._wanted = segmenter, total, wanted
        self._batch_size = batch_size or auto_batch_size(segmenter.spec)
        self._own_batch_size = batch_size
        self._parts = parts_of(segmenter)
        self._torch = [p.module for p in self._parts]
        self._predictor = Predictor(segmenter, 1)
        self._photos = photos
        self._prepared: list[Prepared] = []
        self._reference: list[Prediction] = []
        self._usual: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._trials: list[Trial] = []
        self._pixels = 0

    def result(self) -> Execution:
        asked = self._wanted.dtype == "bfloat16" or self._wanted.engine not in ("auto", "eager")
        self._refuse_impossible()
        ways = self._ways()
        if not ways:
            return self._plainly(self._why_no_way())
        plain = self._run_plain()
        if not asked and plain.seconds * self._total < _WORTH_S:
            return self._plainly(f"{self._total} photos take {plain.seconds * self._total:.0f} s of one core")
        try:
            self._try_all(ways, plain, asked)
        finally:
            self._undo()
        return self._best(plain)

    # -- which ways --------------------------------------------------------------------------------------------------

    def _refuse_impossible(self) -> None:
        name = f"model {self._segmenter.spec.name}"
        if self._wanted.dtype == "float16" or self._wanted.engine == "cudagraphs":
            asked = self._wanted.dtype if self._wanted.dtype == "float16" else "CUDA graphs"
            raise ConfigError(f"this run computes on the CPU: no {asked} there", "leave it at auto")
        if self._wanted.dtype == "bfloat16" and not bfloat16_instructions():
            raise ConfigError("this processor has no bfloat16 instructions", "leave --dtype at auto")
        if not self._parts and (self._wanted.dtype == "bfloat16" or self._wanted.engine in ("openvino", "inductor")):
            raise ConfigError(f"{name} is run by its own runtime, in its own number format", "leave --dtype at auto")

    def _ways(self) -> list[tuple[Engine, Dtype]]:
        """What to try beside float32 in torch, the most promising first."""
        if not self._parts:
            return []
        dtypes: list[Dtype] = ["float32"] if self._wanted.dtype == "float32" else ["bfloat16", "float32"]
        if self._wanted.dtype == "bfloat16":
            dtypes = ["bfloat16"]
        if not bfloat16_instructions():
            dtypes = [d for d in dtypes if d != "bfloat16"]
        engines: list[Engine] = ["openvino", "eager", "inductor"]
        if self._wanted.engine != "auto":
            engines = [e for e in engines if e == self._wanted.engine]
        ways = [(e, d) for e in engines for d in dtypes if (e, d) != ("eager", "float32")]
        return [w for w in ways if self._wanted.engine != "auto" or w != ("inductor", "float32")]

    def _why_no_way(self) -> str:
        if not self._parts:
            return "the model is run by its own runtime"
        return "that is what was asked for"

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _run_plain(self) -> Trial:
        """Float32 in torch: how long it takes, what it says, and what the parts are given.

        Raises:
            ConfigError: no photo can be run.
        """
        from segbatch.inference import engines

        prepared: list[Prepared] = []
        for photo in self._photos:
            try:
                prepared.append(self._predictor.prepare(photo))
            except DataError:
                continue  # a row that will be bad; there are others
        if not prepared:
            raise ConfigError("none of the first photos can be fed to the model", "give --dtype float32")
        began = time.process_time()
        self._predictor.forward(prepared[:1])
        cold = time.process_time() - began
        count = min(max(int(_PASS_S / max(cold, 1e-3)), 2), MAX_CALIBRATION_PHOTOS, len(prepared))
        self._prepared = prepared[:count]
        with engines.listening(self._parts, engines.shapes_of) as seen:
            trial = self._tried("eager", "float32")
        alike = {key: found[0] for key, found in seen.items() if all(f == found[0] for f in found)}
        self._usual = {key: shapes for key, shapes in alike.items() if shapes is not None}
        return trial

    def _try_all(self, ways: Sequence[tuple[Engine, Dtype]], plain: Trial, asked: bool) -> None:
        for engine, dtype in ways:
            if not asked and any(self._will_do(t) and t.seconds < plain.seconds for t in self._trials[1:]):
                break  # what comes next was never found to be much faster than what comes before
            if engine == "inductor" and self._wanted.engine == "auto" and not self._worth_compiling(plain):
                continue
            self._undo()
            self._trial(engine, dtype)

    def _worth_compiling(self, plain: Trial) -> bool:
        """It is compiled for each shape, in each worker."""
        return len(self._usual) > 0 and plain.seconds * self._total > _WORTH_COMPILING_S

    def _trial(self, engine: Engine, dtype: Dtype) -> None:
        from segbatch.inference.openvino_graphs import CannotConvertError

        way = Execution(engine=engine, dtype=dtype, usual=tuple(self._usual.items()))
        try:
            _replaced(self._segmenter, way, 1, lambda: self._prepared[0])
            self._predictor.forward(self._prepared[:1])  # compiles, and fills caches
            self._tried(engine, dtype)
        except (CannotConvertError, *_RUNNING) as error:
            said = str(error).strip().splitlines()
            self._trials.append(Trial(engine, dtype, failed=said[0] if said else type(error).__name__))

    def _undo(self) -> None:
        for part, module in zip(self._parts, self._torch, strict=True):
            part.replace(module)

    def _tried(self, engine: Engine, dtype: Dtype) -> Trial:
        """Run the photos as the segmenter computes now, which is warm; the first way is the reference."""
        said: list[Raw] = []

        def run() -> None:
            said[:] = self._predictor.forward(self._prepared)

        seconds = _seconds(run)
        predictions = [self._predictor.finish(raw) for raw in said]
        same: float | None = 1.0
        if self._reference:
            found = [agreement(a, b) for a, b in zip(self._reference, predictions, strict=True)]
            self._pixels = sum(f.pixels for f in found)
            same = sum(f.same for f in found) / self._pixels if self._pixels else None
        else:
            self._reference = predictions
        trial = Trial(engine, dtype, seconds / len(self._prepared), same)
        self._trials.append(trial)
        return trial

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _will_do(self, trial: Trial) -> bool:
        good = not trial.failed and trial.agreement is not None and trial.agreement >= self._wanted.min_agreement
        return good and self._wanted.dtype in ("auto", trial.dtype)

    def _best(self, plain: Trial) -> Execution:
        good = [t for t in self._trials[1:] if self._will_do(t)]
        if self._wanted.dtype == "auto" and self._wanted.engine == "auto":
            good = [t for t in good if t.seconds < plain.seconds]
        if not good:
            return self._plainly(self._complaint())
        best = min(good, key=lambda t: t.seconds)
        return Execution(
            dtype=best.dtype,
            engine=best.engine,
            batch_size=self._own_batch_size or (1 if best.engine == "openvino" else self._batch_size),
            usual=tuple(self._usual.items()) if best.engine == "openvino" else (),
            agreement=best.agreement,
            speed_up=plain.seconds / best.seconds,
            photos=len(self._prepared),
            pixels=self._pixels,
            why=self._complaint() if best.dtype == "float32" else "",
            trials=tuple(self._trials),
        )

    def _complaint(self) -> str:
        """Why bfloat16, or nothing but torch's float32, is not taken; empty where it is just not faster."""
        limit = self._wanted.min_agreement
        tried = [t for t in self._trials[1:] if not t.failed]
        off = [t for t in tried if t.agreement is not None and t.agreement < limit]
        if off:
            best = max(off, key=lambda t: t.agreement or 0.0)
            return (
                f"{best.dtype if best.dtype != 'float32' else best.name} agrees on {_percent(best.agreement or 0.0)} "
                f"of pixels, less than {100 * limit:g} %: float32 is used"
            )
        if tried and all(t.agreement is None for t in tried):
            return "nothing was found on the photos that were compared: float32 is used"
        failed = [t for t in self._trials if t.failed]
        return f"{failed[0].engine} is not used: {failed[0].failed}" if failed else ""

    def _plainly(self, why: str) -> Execution:
        return Execution(
            batch_size=self._batch_size,
            photos=len(self._prepared),
            pixels=self._pixels,
            why=why,
            trials=tuple(self._trials) if len(self._trials) > 1 else (),
        )


def _seconds(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of a run by a clock: the best of some runs, of one where that takes long."""
    best, spent = math.inf, 0.0
    for _ in range(_PASSES):
        began = clock()
        run()
        took = clock() - began
        best, spent = min(best, took), spent + took
        if spent > _PASS_S:
            break
    return best


def _percent(share: float) -> str:
    """Rounded down: what is below a limit shall not look as if it reached it."""
    return f"{math.floor(share * 10000) / 100:g} %"
