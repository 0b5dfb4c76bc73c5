"""Torch networks on a GPU: bytes of photos go there, label maps come back.

A semantic network is fed raw RGB and normalises it there; its scores stay there until each photo's label map has been
made of them, by the definition of ``kernels.upsample_argmax``. So a photo costs 3 bytes a pixel on the way there and 1
or 4 on the way back. Of any other network the parts (``models.parts``) compute there, and what lies between them here.

Two lanes, each a stream with a pinned buffer: while one thread's batch is computed, another's is copied. Threads launch
work one at a time and wait at the same time. Whatever is asked of the GPU itself goes through ``Device``.
"""

import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.errors import ConfigError
from segbatch.inference.pipeline import Predictor, Raw, not_a_number
from segbatch.models.base import Geometry, Segmenter
from segbatch.models.foreign import ForeignSegmenter, both_classes
from segbatch.models.network import TorchSegmenter
from segbatch.models.parts import parts_of
from segbatch.records import Prediction

_LANES = 2
_MAX_GRAPHS = 8  # shapes with a CUDA graph of their own: each keeps its memory
_WARM_UPS = 2
_BAND = 1 << 25  # scores that are interpolated at a time, so that a large photo of many classes fits
_UNIT = 1 << 24  # probabilities are added up in these steps: sums of integers do not depend on their order
_NO_LIMIT = 1 << 62
_GAIN = 1.05  # a batch twice as large must be so many times as fast


class Wanted(Protocol):
    """What of an ``execution.Execution`` matters here.

    Attributes:
        device: ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``float16`` or ``bfloat16``; the latter two by autocast.
        engine: ``eager``, ``inductor`` (torch.compile) or ``cudagraphs``, for full batches of the first shapes.
        channels_last: memory format.
        batch_size: photos per call.
    """

    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def engine(self) -> str: ...  # noqa: D102
    @property
    def channels_last(self) -> bool: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102


class Device(Protocol):
    """What is asked of a GPU.

    Attributes:
        where: as torch names it.
        out_of_memory: what it raises when its memory is full.
    """

    where: torch.device
    out_of_memory: type[Exception]

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that can be copied from and to while the GPU computes."""
        ...

    def stream(self) -> Any:
        """A queue of work."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Work launched within goes into the stream."""
        ...

    def finish(self, stream: Any) -> None:
        """Wait until all work in the stream is done."""
        ...

    def record(self, stream: Any, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record what ``work`` launches; gives its result, and what launches it again into that very result."""
        ...

    def give_back(self) -> None:
        """Free memory that is kept for later."""
        ...


class Cuda:
    """A GPU of torch's; see ``Device``.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(f"no {name} device here: torch finds no GPU", "leave --device at cpu, or mend the driver")
        self.where = torch.device(name)
        self.out_of_memory: type[Exception] = torch.cuda.OutOfMemoryError

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Device``."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def stream(self) -> Any:
        """See ``Device``."""
        return torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See ``Device``."""
        return torch.cuda.stream(stream)

    def finish(self, stream: Any) -> None:
        """See ``Device``."""
        stream.synchronize()

    def record(self, stream: Any, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """See ``Device``; what other threads wait for meanwhile does not spoil it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay

    def give_back(self) -> None:
        """See ``Device``."""
        torch.cuda.empty_cache()


def accelerated(segmenter: Segmenter, execution: Wanted, device: Device | None = None) -> Segmenter:
    """A model that computes on a GPU.

    Args:
        segmenter: just loaded; its network moves there.
        execution: how.
        device: the GPU; None takes the one that ``execution`` names.

    Raises:
        ConfigError: no GPU, or a model that torch does not run.
    """
    device = device or Cuda(execution.device)
    parts = parts_of(segmenter)
    if not parts:
        raise ConfigError(f"model {segmenter.spec.name} runs on the CPU alone", "leave --device at cpu")
    if isinstance(segmenter, TorchSegmenter | ForeignSegmenter):
        return GpuSegmenter(segmenter, execution, device)
    for part in parts:
        part.replace(GpuPart(part.module, execution, device))
    return segmenter


@dataclass(slots=True)
class _Graph:
    given: Tensor
    result: Tensor
    replay: Callable[[], None]


@dataclass(slots=True)
class _Lane:
    stream: Any
    staging: Tensor
    graphs: dict[tuple[int, ...], _Graph] = field(default_factory=dict)


class GpuSegmenter:
    """A semantic network on a GPU; the spec asks for raw photos where the network's own asks for normalised ones.

    Args:
        segmenter: the network.
        execution: how it computes.
        device: the GPU.
    """

    def __init__(self, segmenter: TorchSegmenter | ForeignSegmenter, execution: Wanted, device: Device) -> None:
        own = segmenter.spec
        self._raw = own.input.dtype == "float32" and own.input.window is None and own.input.resize != "own"
        self._permutes = self._raw or own.input.layout == "nhwc"
        fed = replace(own.input, dtype="uint8", layout="nhwc") if self._raw else own.input
        self._soft = own.output == "logits"
        scores = own.output in ("logits", "probabilities")
        self.spec = replace(own, input=fed, output="own" if scores else own.output)
        if own.input.resize == "own":
            self.prepare = segmenter.prepare  # type: ignore[union-attr]
        self._on_cpu = Predictor(segmenter, 1)
        self._device, self._execution = device, execution
        self._network = _network(segmenter, execution, device)
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (own.input.mean, own.input.std))
        self._scale, self._shift = (1 / (255 * std)).to(device.where), (-mean / std).to(device.where)
        self._launching = threading.Lock()
        self._room = _NO_LIMIT
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(_LANES):
            self._lanes.put(_Lane(device.stream(), device.pinned((0,), torch.uint8)))

    def at_most(self, shape: Sequence[int]) -> int:
        """How many inputs of a shape, without the batch's axis, are computed at once; fewer after out-of-memory."""
        return max(1, self._room // math.prod(shape))

    def forward(self, batch: NDArray[Any]) -> Sequence[Any]:
        """See ``Segmenter``: scores of each image, on the GPU, for ``finish``; or labels (h, w) in numpy.

        A batch for which the memory does not suffice is halved, and so are later ones of its size.
        """
        found: list[Any] = []
        while len(found) < len(batch):
            part = batch[len(found) :][: self.at_most(batch.shape[1:])]
            try:
                found.extend(self._forward(part))
                continue
            except self._device.out_of_memory:
                if len(part) == 1:
                    raise
            self._shrink(part)  # outside the handler, which holds on to what the failed call had in memory
        return found

    def finish(self, raw: Tensor, geometry: Geometry) -> Prediction:
        """The prediction on the upright photo's grid, from one entry of ``forward``'s result.

        Raises:
            DataError: as ``Predictor.finish``.
        """
        known = len(self.spec.classes.classes)
        if known in (0, len(raw)):
            try:
                return self._finish(raw, geometry)
            except self._device.out_of_memory:
                pass
            self._device.give_back()
        return self._on_cpu.finish(Raw(raw.float().cpu().numpy(), geometry))

    # -- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, batch: NDArray[Any]) -> list[Any]:
        lane = self._lanes.get()
        try:
            staged = self._staged(lane, batch)
            with self._launching, self._device.on(lane.stream), torch.inference_mode():
                out = self._run(lane, staged)
                labels = self._to_host(out) if self.spec.output == "labels" else None
        finally:
            self._release(lane)
        return list(out) if labels is None else list(labels.numpy())

    def _staged(self, lane: _Lane, batch: NDArray[Any]) -> Tensor:
        """The batch in the lane's pinned memory."""
        if lane.staging.numel() < batch.nbytes:
            lane.staging = self._device.pinned((batch.nbytes,), torch.uint8)
        dtype = torch.uint8 if batch.dtype == np.uint8 else torch.float32
        staged = lane.staging[: batch.nbytes].view(dtype).view(batch.shape)
        np.copyto(staged.numpy(), batch, casting="no")
        return staged

    def _run(self, lane: _Lane, staged: Tensor) -> Tensor:
        shape = tuple(staged.shape)
        graph = lane.graphs.get(shape)
        full = self._execution.engine == "cudagraphs" and shape[0] == self._execution.batch_size
        if graph is None and full and len(lane.graphs) < _MAX_GRAPHS:
            graph = lane.graphs[shape] = self._recorded(lane, staged)
        if graph is None:
            return self._compute(staged.to(self._device.where, non_blocking=True))
        graph.given.copy_(staged, non_blocking=True)
        graph.replay()
        return graph.result.clone()  # the next replay writes into it

    def _recorded(self, lane: _Lane, staged: Tensor) -> _Graph:
        given = torch.empty(staged.shape, dtype=staged.dtype, device=self._device.where)
        given.copy_(staged)
        for _ in range(_WARM_UPS):  # what libraries set up at first use is no part of the graph
            self._compute(given)
        return _Graph(given, *self._device.record(lane.stream, lambda: self._compute(given)))

    def _compute(self, x: Tensor) -> Tensor:
        """The network's output for a batch as it is fed."""
        if self._permutes:
            x = x.permute(0, 3, 1, 2)
        if self._raw:
            x = x.float() * self._scale + self._shift
        x = x.contiguous(memory_format=_memory_format(self._execution))
        with _precision(self._execution, self._device):
            return self._network(x)

    def _shrink(self, batch: NDArray[Any]) -> None:
        with self._launching:
            self._room = min(self._room, len(batch) // 2 * batch[0].size)
            self._device.give_back()

    # -- finish ------------------------------------------------------------------------------------------------------

    def _finish(self, scores: Tensor, at: Geometry) -> Prediction:
        grids = self._on_cpu.grids(at, scores.shape[1], scores.shape[2])
        lane = self._lanes.get()
        try:
            with self._launching, self._device.on(lane.stream), torch.inference_mode():
                found = winners(scores, *grids, at.height, at.width, self._soft, self.spec.choice.confidence)
                hosts = [self._to_host(t) for t in found]
        finally:
            self._release(lane)
        labels, (sums, pixels, good), certainty = (host.numpy() for host in hosts)
        if not good.all():
            raise not_a_number()
        means = {int(k): float(sums[k] / _UNIT / pixels[k]) for k in np.flatnonzero(pixels)}
        return Prediction(
            semantic=self._on_cpu.named(labels.astype(np.uint16)),
            class_confidence=self._on_cpu.by_label_id(means),
            confidence=certainty.copy() if self.spec.choice.confidence else None,
        )

    def _to_host(self, there: Tensor) -> Tensor:
        """A copy in pinned memory, there once the stream is done."""
        return self._device.pinned(there.shape, there.dtype).copy_(there, non_blocking=True)

    def _release(self, lane: _Lane) -> None:
        try:
            self._device.finish(lane.stream)
        finally:
            self._lanes.put(lane)


class GpuPart(nn.Module):
    """A part of a network on a GPU: tensors come from the CPU and go back there, numbers as float32.

    Args:
        module: the part.
        execution: how it computes.
        device: the GPU.
    """

    def __init__(self, module: nn.Module, execution: Wanted, device: Device) -> None:
        super().__init__()
        self.module = module.to(device.where)
        if execution.engine == "inductor":
            self.module.compile()
        self._execution, self._device = execution, device

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the part gives."""
        there = _each(given, lambda t: t.to(self._device.where)), _each(named, lambda t: t.to(self._device.where))
        with _precision(self._execution, self._device):
            result = self.module(*there[0], **there[1])
        return _each(result, lambda t: t.float().cpu() if t.is_floating_point() else t.cpu())


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((k, _each(v, change)) for k, v in value.items())
    if isinstance(value, tuple | list):
        return type(value)(_each(v, change) for v in value)
    return value


def _network(
    segmenter: TorchSegmenter | ForeignSegmenter, execution: Wanted, device: Device
) -> Callable[[Tensor], Tensor]:
    """(n, 3, h, w) on the device -> the network's output."""
    [part] = parts_of(segmenter)
    module = part.module.to(device.where)
    if execution.engine == "inductor":
        module.compile()

    def scores(images: Tensor) -> Tensor:
        if isinstance(segmenter, TorchSegmenter):
            return torch.as_tensor(module(images))
        return both_classes(segmenter.scores(images.flip(1) if segmenter._flip else images), segmenter.spec)

    return scores


def _precision(execution: Wanted, device: Device) -> AbstractContextManager[Any]:
    """Autocast; without its cache of weights, which a CUDA graph would outlive."""
    dtype = getattr(torch, execution.dtype)
    return torch.autocast(device.where.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def _memory_format(execution: Wanted) -> torch.memory_format:
    return torch.channels_last if execution.channels_last else torch.contiguous_format


def winners(
    scores: Tensor,
    grid_y: tuple[float, float],
    grid_x: tuple[float, float],
    height: int,
    width: int,
    soft: bool,
    certain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.upsample_argmax`` in torch, on the device of the scores; nothing is waited for.

    Args:
        scores: (channels, rows, columns).
        grid_y, grid_x, soft: see there.
        height, width: of the photo.
        certain: the probability of each pixel's winner is wanted, too.

    Returns:
        The winning channel, (height, width) uint8, or int32 for more than 256 channels; int64 (3, channels): sums of
        the winners' probabilities in steps of 1 / 2**24, pixels won, and 0 where some pixel's scores are no numbers;
        the probabilities, (height, width) uint8 in steps of 1/255, or (0, 0).
    """
    channels, rows, columns = scores.shape
    top, bottom, down = _neighbours(height, grid_y, rows, scores.device)
    left, right, across = _neighbours(width, grid_x, columns, scores.device)
    labels = torch.empty((height, width), dtype=torch.uint8 if channels <= 256 else torch.int32, device=scores.device)
    certainty = torch.empty((height, width) if certain else (0, 0), dtype=torch.uint8, device=scores.device)
    figures = torch.zeros((3, channels), dtype=torch.int64, device=scores.device)
    figures[2] = 1
    band = max(1, _BAND // (channels * width))
    for cut in (slice(y, y + band) for y in range(0, height, band)):
        upper, lower = scores[:, top[cut]].float(), scores[:, bottom[cut]].float()
        lines = upper + (lower - upper) * down[cut, None]
        here = lines[:, :, left]
        here = here + (lines[:, :, right] - here) * across
        best, winner = here.max(0)
        total = (here - best).exp().sum(0) if soft else here.sum(0)
        share = 1 / total if soft else torch.where(total > 0, best / total, 1 / channels)
        labels[cut] = winner.to(labels.dtype)
        figures[0].index_add_(0, winner.flatten(), (share * _UNIT).round().long().flatten())
        figures[1].index_add_(0, winner.flatten(), torch.ones_like(winner).flatten())
        figures[2] *= (total >= (1.0 if soft else 0.0)).all()
        if certain:
            certainty[cut] = (255 * share + 0.5).to(torch.uint8)
    return labels, figures, certainty


def _neighbours(size: int, grid: tuple[float, float], limit: int, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` pixels the scores before and behind it, and the weight of the latter."""
    step, shift = grid
    at = ((torch.arange(size, dtype=torch.float64, device=where) + 0.5) * step - shift).clamp(0, limit - 1)
    first = at.long()
    return first, (first + 1).clamp(max=limit - 1), (at - first).float()


def best_batch_size(
    segmenter: GpuSegmenter, image: NDArray[Any], most: int = 64, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The batch size, a power of two, beyond which images per second hardly rise; what fits into memory at most.

    Args:
        segmenter: the model; what it finds out about its memory it remembers.
        image: one input, as ``forward`` takes a batch of.
        most: larger ones are not tried.
        clock: seconds.
    """
    best, rate = 1, 0.0
    for size in itertools.takewhile(lambda n: n <= most, (1 << i for i in itertools.count())):
        batch = np.repeat(image[None], size, 0)
        segmenter.forward(batch)
        if segmenter.at_most(image.shape) < size:
            break
        began = clock()
        segmenter.forward(batch)
        now = size / max(clock() - began, 1e-9)
        if now < _GAIN * rate:
            break
        best, rate = size, now
    return best


# -- utilisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuUse:
    """How a GPU was used.

    Attributes:
        name: of the GPU.
        busy: mean share of the time in which something computed on it, 0..1, by anybody.
        memory_bytes: most that was in use, by anybody.
        samples: of which that is the mean.
    """

    name: str
    busy: float
    memory_bytes: int
    samples: int


class GpuSampler:
    """Looks at a GPU's utilisation until it is stopped, in a thread of its own.

    Args:
        index: which of the GPUs that this process may use (``CUDA_VISIBLE_DEVICES``).
        every: seconds between looks; NVML itself averages over .2 to 1 s.
        nvml: the module ``pynvml``; None imports it (package nvidia-ml-py).
    """

    def __init__(self, index: int = 0, every: float = 0.5, nvml: Any = None) -> None:
        self._nvml = nvml or _nvml()
        self._handle: Any = None
        self._name, self._memory = "", 0
        self._busy: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(every,), name="gpu-sampler", daemon=True)
        if self._nvml is not None and self._opened(index):
            self._thread.start()

    def stop(self) -> GpuUse | None:
        """What was seen, see ``use``; it looks no more."""
        self._stopped.set()
        if self._handle is None:
            return None
        self._thread.join()
        self._nvml.nvmlShutdown()
        return self.use()

    def use(self) -> GpuUse | None:
        """What was seen so far; None without NVML, or a GPU, or a single look."""
        if not self._busy:
            return None
        return GpuUse(self._name, sum(self._busy) / len(self._busy), self._memory, len(self._busy))

    def _opened(self, index: int) -> bool:
        try:
            self._nvml.nvmlInit()
            visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
            wanted = visible[index] if visible else str(index)
            number = wanted.isdigit()
            by = self._nvml.nvmlDeviceGetHandleByIndex if number else self._nvml.nvmlDeviceGetHandleByUUID
            self._handle = by(int(wanted) if number else wanted)
            name = self._nvml.nvmlDeviceGetName(self._handle)
        except (self._nvml.NVMLError, IndexError):
            self._handle = None
            return False
        self._name = name.decode() if isinstance(name, bytes) else str(name)
        return True

    def _look(self, every: float) -> None:
        while not self._stopped.wait(every):
            try:
                busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
                memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
            except self._nvml.NVMLError:
                return  # the GPU is gone; what was seen counts
            self._busy.append(busy)
            self._memory = max(self._memory, memory)


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
