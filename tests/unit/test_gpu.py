"""The GPU path on a device that computes on the CPU: the same predictions, fewer bytes, and what happens when memory
is full. What only a GPU can show is in ``tests/bench/bench_gpu.py``."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, FakeOutOfMemoryError, Hungry
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.errors import ConfigError, DataError
from segbatch.inference import gpu
from segbatch.inference.kernels import upsample_argmax
from segbatch.inference.pipeline import Predictor
from segbatch.models.base import Choice, InputSpec, ModelSpec, Segmenter
from segbatch.models.config import UNetConfig
from segbatch.models.foreign import ForeignSegmenter
from segbatch.models.network import TorchSegmenter
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable, Prediction

THREE = ClassTable(tuple(ClassInfo(i, f"c{i}") for i in (4, 7, 900)))
SPEC = ModelSpec("m", "semantic", THREE, InputSpec(divisor=4), "logits", "d")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker computes; networks as small as these only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Execution:
    """See ``gpu.Wanted``."""

    device: str = "cuda"
    dtype: str = "float32"
    engine: str = "eager"
    channels_last: bool = True
    batch_size: int = 2


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(UNetConfig(width=4, depth=3), 3)


def photos(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def predictions(segmenter: Segmenter, images: list[NDArray[np.uint8]], batch_size: int = 2) -> list[Prediction]:
    predictor = Predictor(segmenter, batch_size)
    return [predictor.finish(raw) for raw in predictor.forward([predictor.prepare(i) for i in images])]


def on_gpu(net: nn.Module, spec: ModelSpec = SPEC, **execution: Any) -> tuple[gpu.GpuSegmenter, FakeDevice]:
    device = FakeDevice()
    made = gpu.accelerated(TorchSegmenter(net, spec), Execution(**execution), device)
    assert isinstance(made, gpu.GpuSegmenter)
    return made, device


def assert_alike(ours: list[Prediction], theirs: list[Prediction], share: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.semantic is not None and b.semantic is not None
        assert a.semantic.dtype == b.semantic.dtype == np.uint16
        assert (a.semantic == b.semantic).mean() >= share
        assert a.class_confidence == pytest.approx(b.class_confidence, abs=0.02)


MIXED = [(32, 40), (16, 16), (32, 40), (15, 21), (32, 40)]


@pytest.mark.parametrize(
    "given",
    [
        InputSpec(divisor=4),
        InputSpec(divisor=4, layout="nhwc"),
        InputSpec(24, 28, "stretch", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)),
        InputSpec(24, 28, "letterbox"),
        InputSpec(20, resize="short-side", divisor=4, align_corners=True),
    ],
)
def test_predictions_are_those_of_the_cpu(given: InputSpec) -> None:
    spec = replace(SPEC, input=given)
    wanted = predictions(TorchSegmenter(unet(), spec), photos(*MIXED))
    segmenter, _ = on_gpu(unet(), spec)
    assert (segmenter.spec.input.dtype, segmenter.spec.digest) == ("uint8", spec.digest)
    assert_alike(predictions(segmenter, photos(*MIXED)), wanted, 0.995)


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_other_libraries_networks_and_one_output_that_means_two(channel_order: Any, output: Any) -> None:
    two = ClassTable(tuple(ClassInfo(i, f"c{i}") for i in range(2)))
    spec = replace(SPEC, classes=two, output=output, choice=Choice(confidence=True))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 1, 3, 2, 1), nn.Sigmoid() if output == "probabilities" else nn.Identity())
    plain = predictions(ForeignSegmenter(net, spec, channel_order), photos(*MIXED))
    fast = predictions(
        gpu.accelerated(ForeignSegmenter(net, spec, channel_order), Execution(), FakeDevice()), photos(*MIXED)
    )
    assert_alike(fast, plain, 0.99)
    for a, b in zip(fast, plain, strict=True):
        assert a.confidence is not None and b.confidence is not None
        assert np.abs(a.confidence.astype(int) - b.confidence).max() <= 2


def test_half_precision_is_near() -> None:
    wanted = predictions(TorchSegmenter(unet(), SPEC), photos(*MIXED))
    segmenter, _ = on_gpu(unet(), dtype="bfloat16")
    found = segmenter.forward(np.zeros((1, 16, 16, 3), np.uint8))[0]
    assert found.dtype == torch.bfloat16
    assert_alike(predictions(segmenter, photos(*MIXED)), wanted, 0.9)


def test_labels_come_back_as_they_are() -> None:
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, 0] > 0).long() + (x[:, 1] > 0)

    spec = replace(SPEC, output="labels")
    wanted = predictions(TorchSegmenter(Labels(), spec), photos(*MIXED))
    for a, b in zip(predictions(on_gpu(Labels(), spec)[0], photos(*MIXED)), wanted, strict=True):
        np.testing.assert_array_equal(a.semantic, b.semantic)


def test_only_bytes_go_there_and_only_labels_come_back() -> None:
    segmenter, device = on_gpu(unet())
    predictions(segmenter, photos((32, 40), (32, 40)))
    there, *back = [size for size in device.pinned_bytes if size]
    assert there == 2 * 32 * 40 * 3
    assert sorted(back) == sorted([32 * 40, 32 * 40, 3 * 3 * 8, 3 * 3 * 8])
    started = {s for what, s in device.log if what == "on"}
    for stream in started:  # nothing is read before its stream is done
        said = [what for what, s in device.log if s == stream]
        assert said == ["on", "finish"] * (len(said) // 2)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_winners_are_those_of_the_kernel(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    channels, rows, columns, height, width = draw(1, 5), draw(1, 7), draw(1, 7), draw(1, 20), draw(1, 20)
    soft = data.draw(st.booleans())
    rng = np.random.default_rng(draw(0, 2**31))
    scores = rng.random((channels, rows, columns), np.float32) * (8 if soft else 1)
    grids = [(n / size, data.draw(st.sampled_from([0.5, 0.0]))) for n, size in ((rows, height), (columns, width))]
    classes, sums, pixels = np.empty((height, width), np.uint16), np.zeros(channels), np.zeros(channels, np.int64)
    certainty = np.empty((height, width), np.uint8)
    assert upsample_argmax(scores, grids[0], grids[1], soft, classes, sums, pixels, certainty)
    tensor = torch.from_numpy(scores)
    labels, figures, certain = gpu.winners(tensor, grids[0], grids[1], height, width, soft, True)
    np.testing.assert_array_equal(labels.numpy(), classes)
    np.testing.assert_array_equal(figures[1].numpy(), pixels)
    np.testing.assert_allclose(figures[0].numpy() / 2**24, sums, rtol=1e-4, atol=1e-4)
    assert np.abs(certain.numpy().astype(int) - certainty).max() <= 1
    assert bool(figures[2].all())


def test_large_photos_are_done_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(4, 9, 11, generator=torch.Generator().manual_seed(0))
    whole = gpu.winners(scores, (0.1, 0.5), (0.1, 0.5), 90, 110, True, True)
    monkeypatch.setattr(gpu, "_BAND", 4 * 110 * 7)
    for a, b in zip(gpu.winners(scores, (0.1, 0.5), (0.1, 0.5), 90, 110, True, True), whole, strict=True):
        assert torch.equal(a, b)


def test_more_than_256_classes_keep_their_numbers() -> None:
    scores = torch.zeros(300, 1, 2)
    scores[299, 0, 0] = scores[7, 0, 1] = 9.0
    labels, _, _ = gpu.winners(scores, (1.0, 0.5), (1.0, 0.5), 1, 2, True, False)
    assert labels.tolist() == [[299, 7]]


@pytest.mark.parametrize(("output", "bad"), [("logits", np.nan), ("logits", np.inf), ("probabilities", np.nan)])
def test_what_is_no_number_is_a_data_error(output: Any, bad: float) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.abs().clone()
            y[:, 1, 2, 2] = bad
            return y

    segmenter, _ = on_gpu(Broken(), replace(SPEC, output=output))
    with pytest.raises(DataError) as caught:
        predictions(segmenter, photos((8, 8)))
    assert caught.value.code == "not-a-number"


def test_another_number_of_channels_is_a_data_error() -> None:
    segmenter, _ = on_gpu(nn.Conv2d(3, 5, 1))
    with pytest.raises(DataError, match="5 channels, its class table has 3"):
        predictions(segmenter, photos((8, 8)))


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_batch_too_large_is_halved_and_that_is_remembered() -> None:
    net = Hungry(unet(), room=3 * 32 * 40)
    segmenter, device = on_gpu(net)
    images = photos(*[(32, 40)] * 8)
    wanted = predictions(TorchSegmenter(unet(), SPEC), images)
    assert_alike(predictions(segmenter, images, batch_size=8), wanted, 0.995)
    assert net.sizes == [2, 2, 2, 2]
    assert device.count("give back") == 2  # 8, then 4
    assert segmenter.at_most((32, 40, 3)) == 2 and segmenter.at_most((16, 20, 3)) == 8
    predictions(segmenter, images, batch_size=8)
    assert device.count("give back") == 2


def test_one_photo_too_large_fails_and_the_next_does_not() -> None:
    segmenter, _ = on_gpu(Hungry(unet(), room=32 * 40))
    with pytest.raises(FakeOutOfMemoryError):
        predictions(segmenter, photos((64, 64)))
    for _ in range(4):  # every lane has been given back
        assert len(predictions(segmenter, photos((32, 40)))) == 1


def test_a_label_map_that_finds_no_memory_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = predictions(TorchSegmenter(unet(), SPEC), photos((32, 40)))

    def full(*_: Any) -> Any:
        raise FakeOutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "winners", full)
    segmenter, device = on_gpu(unet())
    assert_alike(predictions(segmenter, photos((32, 40))), wanted, 0.995)
    assert device.count("give back") == 1


@pytest.mark.parametrize(("seconds_fixed", "room", "best"), [(0.0, 10**9, 1), (1.0, 10**9, 16), (1.0, 5 * 64, 4)])
def test_the_best_batch_size_is_where_more_no_longer_helps_or_fits(seconds_fixed: float, room: int, best: int) -> None:
    now = 0.0

    class Timed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal now
            now += seconds_fixed + len(x)
            return x[:, :3]

    segmenter, _ = on_gpu(Hungry(Timed(), room))
    assert gpu.best_batch_size(segmenter, np.zeros((8, 8, 3), np.uint8), 64, lambda: now) == best


# -- engines, threads, devices ---------------------------------------------------------------------------------------


def test_full_batches_of_a_shape_are_recorded_once_a_lane_and_played_again() -> None:
    segmenter, device = on_gpu(unet(), engine="cudagraphs", batch_size=2)
    for seed in range(4):
        images = [np.roll(i, seed, 0) for i in photos(*[(32, 40)] * 5)]
        wanted = predictions(TorchSegmenter(unet(), SPEC), images)
        assert_alike(predictions(segmenter, images), wanted, 0.995)
    assert 1 <= device.count("record") <= 2
    assert device.count("replay") == 8  # two full batches of each five photos; the fifth goes without


def test_results_outlive_the_next_replay() -> None:
    segmenter, _ = on_gpu(unet(), engine="cudagraphs", batch_size=1)
    first, second = (np.full((1, 16, 16, 3), v, np.uint8) for v in (0, 250))
    kept = segmenter.forward(first)[0]
    before = kept.clone()
    for _ in range(4):
        segmenter.forward(second)
    assert torch.equal(kept, before)


def test_graphs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_MAX_GRAPHS", 2)
    segmenter, device = on_gpu(unet(), engine="cudagraphs", batch_size=1)
    for side in (8, 12, 16, 20, 24) * 2:
        segmenter.forward(np.zeros((1, side, side, 3), np.uint8))
    assert device.count("record") <= 2 * 2


def test_inductor_compiles_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    net = unet()
    on_gpu(net, engine="inductor")
    assert compiled == [net]


def test_threads_launch_one_at_a_time_and_get_their_own_results() -> None:
    segmenter, device = on_gpu(unet())
    images = photos(*[(32, 40)] * 24)
    wanted = predictions(TorchSegmenter(unet(), SPEC), images)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: predictions(segmenter, [i])[0], images))
    assert_alike(found, wanted, 0.995)
    assert device.most_launching == 1
    assert {stream for what, stream in device.log if what == "on"} == {1, 2}


def test_parts_of_any_other_network_compute_on_the_device() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, *, more: list[Tensor]) -> dict[str, Any]:
            assert x.dtype == torch.float32
            return {"double": x @ x, "sizes": (len(x), [more[0].long()])}

    part = gpu.GpuPart(Twice(), Execution(dtype="bfloat16"), FakeDevice())
    found = part(torch.eye(3), more=[torch.ones(2)])
    assert found["double"].dtype == torch.float32 and torch.equal(found["double"], torch.eye(3))
    assert found["sizes"][0] == 3 and found["sizes"][1][0].dtype == torch.int64


def test_a_network_in_parts_stays_itself() -> None:
    class InParts:
        spec = SPEC

        def __init__(self) -> None:
            self.net: nn.Module = unet()

        def parts(self) -> list[Any]:
            from segbatch.models.parts import Part

            return [Part("d", self, "net")]

        def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
            with torch.inference_mode():
                out: NDArray[Any] = self.net(torch.from_numpy(batch)).numpy()
            return out

    wanted = predictions(InParts(), photos(*MIXED))
    segmenter = InParts()
    assert gpu.accelerated(segmenter, Execution(), FakeDevice()) is segmenter
    assert isinstance(segmenter.net, gpu.GpuPart)
    assert_alike(predictions(segmenter, photos(*MIXED)), wanted, 1.0)


def test_what_torch_does_not_run_is_refused() -> None:
    class Foreign:
        spec = SPEC

        def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
            return batch

    with pytest.raises(ConfigError, match="runs on the CPU alone"):
        gpu.accelerated(Foreign(), Execution(), FakeDevice())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_said() -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        gpu.accelerated(TorchSegmenter(unet(), SPEC), Execution())


# -- utilisation -----------------------------------------------------------------------------------------------------


class NvmlError(Exception):
    """NVML's own."""


class FakeNvml:
    """The module ``pynvml`` as far as it is used, with two GPUs."""

    NVMLError = NvmlError

    def __init__(self, looks: int = 3) -> None:
        self.looked = threading.Event()
        self.asked: list[int | str] = []
        self.shut = False
        self._busy = iter([20, 40, 90][:looks])

    def nvmlInit(self) -> None:  # noqa: N802
        self.shut = False

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut = True

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        if index > 1:
            raise NvmlError("no such GPU")
        return f"handle-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle-1"

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return b"Fake " + handle.encode()

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        try:
            return SimpleNamespace(gpu=next(self._busy))
        except StopIteration:
            self.looked.set()
            raise NvmlError("fallen off the bus") from None

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=5 << 30)


def test_utilisation_is_the_mean_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml()
    sampler = gpu.GpuSampler(1, every=0.001, nvml=nvml)
    assert nvml.looked.wait(5)
    use = sampler.stop()
    assert use is not None and use.busy == pytest.approx(0.5)
    assert (use.name, use.memory_bytes, use.samples) == ("Fake handle-1", 5 << 30, 3)
    assert nvml.shut


@pytest.mark.parametrize(("visible", "index", "asked"), [("1,0", 0, 1), ("GPU-abc,GPU-def", 1, "GPU-def"), ("", 1, 1)])
def test_the_gpu_is_the_one_that_torch_means(
    monkeypatch: pytest.MonkeyPatch, visible: str, index: int, asked: int | str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    gpu.GpuSampler(index, every=0.001, nvml=nvml).stop()
    assert nvml.asked == [asked]


def test_nothing_to_see_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.GpuSampler(7, every=0.001, nvml=FakeNvml()).stop() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu.GpuSampler(3, every=0.001, nvml=FakeNvml()).stop() is None
    nothing = FakeNvml(looks=0)
    sampler = gpu.GpuSampler(0, every=0.001, nvml=nothing)
    assert nothing.looked.wait(5)
    assert sampler.stop() is None and nothing.shut
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    assert gpu.GpuSampler(0).stop() is None
