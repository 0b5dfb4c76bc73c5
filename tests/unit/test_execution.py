"""How a model computes: measured, chosen, kept, and the same labels whoever computes them."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import photos
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch import api, jobs
from segbatch.codecs import rle
from segbatch.config import EngineConfig, ExecutionConfig, RunOptions
from segbatch.errors import ConfigError
from segbatch.inference import engines, execution, kernels
from segbatch.inference.execution import Execution, agreement, decide
from segbatch.inference.pipeline import Predictor
from segbatch.models import checkpoint
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.config import MaskRCNNConfig, UNetConfig
from segbatch.models.maskrcnn import MaskRCNN, MaskRCNNSegmenter
from segbatch.models.network import TorchSegmenter
from segbatch.models.unet import UNet
from segbatch.records import ClassInfo, ClassTable, Instance, Prediction, Segment
from segbatch.stages import calibrate

openvino_graphs = pytest.importorskip("segbatch.inference.openvino_graphs")
pytest.importorskip("openvino")

THREE = ClassTable(tuple(ClassInfo(i, f"c{i}", isthing=True) for i in (4, 7, 900)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(execution, "bfloat16_instructions", lambda: True)
    monkeypatch.setattr(execution, "_PASS_S", 0.01)


def tiny(digest: str = "d") -> TorchSegmenter:
    """A U-Net with random weights that takes any multiple of 4."""
    torch.manual_seed(0)
    spec = ModelSpec("m", "semantic", THREE, InputSpec(layout="nhwc", divisor=4), "logits", digest)
    return TorchSegmenter(UNet(UNetConfig(width=4, depth=3), 3), spec)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SOME = [noise(40, 48, seed) for seed in range(4)]


def wanted(**said: Any) -> ExecutionConfig:
    return ExecutionConfig(**said)


def ways(found: Execution) -> list[str]:
    return [t.name for t in found.trials]


def takes(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Runs take so long, one way after the other, by the clock of the calibration."""
    left = iter(seconds)

    def timed(run: Callable[[], object]) -> float:
        run()
        return next(left) * 2  # photos

    monkeypatch.setattr(execution, "_seconds", timed)


# -- choosing --------------------------------------------------------------------------------------------------------


def test_little_work_is_not_measured() -> None:
    found = decide(tiny(), SOME, 100)
    assert found.plain and not found.trials and "100 photos take" in found.why


@pytest.mark.long
def test_the_fastest_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, 1.0, 0.25)  # float32 in torch, OpenVINO in bfloat16
    found = decide(tiny(), SOME[:2], 10**6, wanted(min_agreement=0.0))
    assert ways(found) == ["eager float32", "openvino bfloat16"]
    assert (found.engine, found.dtype, found.speed_up, found.batch_size) == ("openvino", "bfloat16", 4.0, 1)
    assert found.agreement is not None and found.agreement > 0.5 and found.photos == 2
    assert found.pixels == 2 * 40 * 48
    assert "4.0 times as fast, agrees with float32 on" in found.said and "3,840 pixels of 2 photos" in found.said


def test_what_is_slower_than_torch_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, 1.0, 1.25, 0.5)  # float32 in torch, OpenVINO in bfloat16 and float32
    found = decide(tiny(), SOME[:2], 10**6, wanted(min_agreement=0.0))
    assert ways(found) == ["eager float32", "openvino bfloat16", "openvino float32"]
    assert (found.engine, found.dtype, found.speed_up) == ("openvino", "float32", 2.0)


def test_what_does_not_agree_is_not_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees = iter([execution.Agreement(9615, 10000)] * 2 + [execution.Agreement(10, 10)] * 2)
    monkeypatch.setattr(execution, "agreement", lambda a, b: next(agrees))
    found = decide(tiny(), SOME[:2], 10**6, wanted(engine="openvino"))  # how many are looked at depends on the machine
    assert (found.engine, found.dtype) == ("openvino", "float32")
    assert "bfloat16 agrees on 96.15 % of pixels, less than 99 %: float32 is used" in found.said


def test_bfloat16_that_was_asked_for_must_agree_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "agreement", lambda a, b: execution.Agreement(962, 1000))
    found = decide(tiny(), SOME, 3, wanted(dtype="bfloat16"))
    assert found.plain
    assert found.said == (
        "computing in float32 by torch (bfloat16 agrees on 96.2 % of pixels, less than 99 %: float32 is used)"
    )


def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "bfloat16_instructions", lambda: False)
    found = decide(tiny(), SOME, 10**6, wanted(min_agreement=0.0))
    assert {t.dtype for t in found.trials} == {"float32"} and found.dtype == "float32"
    with pytest.raises(ConfigError, match="this processor has no bfloat16 instructions"):
        decide(tiny(), SOME, 10**6, wanted(dtype="bfloat16"))


def test_without_openvino_torch_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graphs, "available", lambda: False)
    found = decide(tiny(), SOME, 3, wanted(dtype="bfloat16", min_agreement=0.0))
    assert found.engine == "eager" and found.dtype == "bfloat16"
    assert "openvino is missing" in found.trials[1].failed


class _Odd(nn.Module):
    """Computes something else as soon as a photo is tall: what the tracer cannot see."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[2] > 128 else x


def test_a_network_that_the_converter_gets_wrong_stays_in_torch() -> None:
    spec = ModelSpec("m", "semantic", THREE, InputSpec(divisor=4), "logits", "odd")
    found = decide(TorchSegmenter(_Odd(), spec), SOME, 10**6, wanted(engine="openvino"))
    assert found.plain and "computes something else" in found.why


def test_a_model_of_another_runtime_is_left_alone() -> None:
    class Table:
        spec = ModelSpec("t", "semantic", THREE, InputSpec(dtype="uint8", layout="nhwc"), "labels", "t")

        def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
            return batch[..., 0] % 3

    assert decide(Table(), SOME, 10**6).why == "the model is run by its own runtime"
    with pytest.raises(ConfigError, match="model t is run by its own runtime"):
        decide(Table(), SOME, 10**6, wanted(dtype="bfloat16"))


def test_deciding_leaves_the_model_as_it_was() -> None:
    segmenter = tiny()
    before = segmenter.forward(noise(8, 8)[None].astype(np.float32))
    decide(segmenter, SOME, 10**6, wanted(min_agreement=0.0))
    assert np.array_equal(segmenter.forward(noise(8, 8)[None].astype(np.float32)), before)


def test_an_execution_survives_json() -> None:
    found = decide(tiny(), SOME, 10**6, wanted(engine="openvino", min_agreement=0.0))
    assert Execution.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_on_a_gpu_the_fastest_format_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from segbatch.inference import gpu

    seen: list[str] = []

    def accelerated(segmenter: TorchSegmenter, way: Execution) -> TorchSegmenter:
        seen.append(way.dtype)
        if way.dtype == "float16":
            segmenter.parts()[0].replace(nn.Conv2d(3, 3, 1))
        return segmenter

    times = iter([0.1, 0.2, 0.8])
    monkeypatch.setattr(gpu, "accelerated", accelerated)
    monkeypatch.setattr(execution, "_seconds", lambda run, clock: next(times))
    found = execution.decide_on_gpu(tiny, SOME)
    assert (found.device, found.dtype, found.batch_size) == ("cuda", "bfloat16", 1)
    assert found.speed_up == pytest.approx(4.0) and seen == ["float16", "bfloat16", "float32", "bfloat16"]
    times = iter([0.1])
    monkeypatch.setattr(execution, "agreement", lambda a, b: execution.Agreement(1, 2))
    with pytest.raises(ConfigError, match="bfloat16 agrees with float32 on 50 % of pixels, less than 99 %"):
        execution.decide_on_gpu(tiny, SOME, wanted(dtype="bfloat16"))
    with pytest.raises(ConfigError, match="OpenVINO computes on the CPU alone"):
        execution.decide_on_gpu(tiny(), SOME, wanted(engine="openvino"))


@pytest.mark.parametrize(
    ("said", "word"), [({"dtype": "float16"}, "float16"), ({"engine": "cudagraphs"}, "CUDA graph")]
)
def test_what_is_for_gpus_is_refused_on_a_cpu(said: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=f"this run computes on the CPU: no {word}"):
        decide(tiny(), SOME, 10**6, wanted(**said))


def test_on_a_gpu_the_engine_that_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from segbatch.inference import gpu

    device = FakeDevice()
    real = gpu.accelerated
    monkeypatch.setattr(gpu, "accelerated", lambda segmenter, way: real(segmenter, way, device))
    monkeypatch.setattr(gpu, "best_batch_size", lambda segmenter, image: 2)
    found = execution.decide_on_gpu(tiny, SOME, wanted(dtype="float32", engine="cudagraphs"))
    assert (found.engine, found.dtype, found.batch_size) == ("cudagraphs", "float32", 2)
    assert found.agreement and found.agreement > 0.999
    chosen = Predictor(real(tiny(), found, device), found.batch_size)
    image = chosen.prepare(SOME[0])
    before = [what for what, _ in device.log].count("record")
    chosen.forward([image, image])
    assert [what for what, _ in device.log].count("record") == before + 1


# -- applying --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("engine", ["openvino", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_labels_are_those_of_torch(engine: Any, dtype: Any) -> None:
    plain = Predictor(tiny(), 1)
    fast = Predictor(execution.apply(tiny(), Execution(engine=engine, dtype=dtype), threads=2), 1)
    seen = [noise(40, 48), noise(20, 100, 1), noise(131, 64, 2)] * 2
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(fast.predict, seen))
    for rgb, ours in zip(seen, found, strict=True):
        theirs = plain.predict(rgb)
        same, pixels = agreement(ours, theirs)
        assert same >= (0.999 if dtype == "float32" else 0.9) * pixels
        assert ours.class_confidence is not None and theirs.class_confidence is not None
        for label, mean in theirs.class_confidence.items():
            assert ours.class_confidence[label] == pytest.approx(mean, abs=0.02)


def test_a_worker_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution, "bfloat16_instructions", lambda: False)
    way = Execution(engine="eager", dtype="bfloat16")
    ours = Predictor(execution.apply(tiny(), way), 1).predict(SOME[0])
    assert np.array_equal(ours.semantic, Predictor(tiny(), 1).predict(SOME[0]).semantic)  # type: ignore[arg-type]
    assert "the processor of this node cannot" in caplog.text


def test_a_worker_without_openvino_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graphs, "available", lambda: False)
    with pytest.raises(ConfigError, match="this run computes by openvino, but the package openvino is missing"):
        execution.apply(tiny(), Execution(engine="openvino", dtype="float32"))


@pytest.mark.long
def test_the_pieces_of_a_detector_find_what_torch_finds() -> None:
    torch.manual_seed(0)
    config = MaskRCNNConfig(width=0.125)
    spec = ModelSpec("r", "instance", THREE, InputSpec(layout="nhwc", divisor=32), "detections", "r")
    nets = [MaskRCNN(config, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, fast = (MaskRCNNSegmenter(n, spec) for n in nets)
    execution.apply(fast, Execution(engine="openvino", dtype="float32"))
    batch = np.random.default_rng(0).normal(size=(1, 96, 128, 3)).astype(np.float32)
    ours, theirs = fast.forward(batch)[0], plain.forward(batch)[0]
    assert len(theirs.boxes) and np.allclose(np.sort(ours.scores), np.sort(theirs.scores), atol=1e-3)
    assert {type(p.module).__name__ for p in fast.parts()} == {"OpenVinoPart"} and len(fast.parts()) == 6


# -- the cache -------------------------------------------------------------------------------------------------------


def _runs(segmenter: TorchSegmenter) -> Iterator[Callable[[], None]]:
    def run() -> None:
        for size in ((32, 48), (48, 32)):
            segmenter.forward(np.zeros((1, *size, 3), np.float32))

    yield run


def _no_runs() -> Iterator[Callable[[], None]]:
    raise AssertionError("a graph that is kept is not converted again")
    yield


def test_a_graph_is_converted_once() -> None:
    segmenter = tiny()
    openvino_graphs.graphs_of(segmenter.parts(), _runs(segmenter))
    assert set(openvino_graphs.graphs_of(segmenter.parts(), _no_runs())) == {"d"}
    other = tiny("another")
    with pytest.raises(AssertionError, match="not converted again"):
        openvino_graphs.graphs_of(other.parts(), _no_runs())


def test_any_number_of_processes_may_convert_at_once() -> None:
    segmenter = tiny()
    graph = openvino_graphs.graphs_of(segmenter.parts(), _runs(segmenter))["d"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: openvino_graphs._keep("raced", graph), range(8)))
    kept = sorted(p.name for p in openvino_graphs.cache_folder().iterdir())
    assert len(kept) == 2 and not any(name.startswith(".") for name in kept)
    assert openvino_graphs._kept("raced") is not None


def test_a_broken_graph_is_converted_again() -> None:
    segmenter = tiny()
    openvino_graphs.graphs_of(segmenter.parts(), _runs(segmenter))
    for file in openvino_graphs.cache_folder().rglob("graph.xml"):
        file.write_text("<net")
    assert openvino_graphs.graphs_of(segmenter.parts(), _runs(segmenter))
    assert openvino_graphs.graphs_of(segmenter.parts(), _no_runs())


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGBATCH_CACHE", str(tmp_path / "file"))
    segmenter = tiny()
    assert openvino_graphs.graphs_of(segmenter.parts(), _runs(segmenter))


# -- what is compared ------------------------------------------------------------------------------------------------


def _instance(left: int, wide: int, score: float = 0.9, category: int = 4) -> Instance:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, left : left + wide] = 1
    return Instance(1, category, (left, 0, wide, 10), 10.0 * wide, False, rle.encode(mask), score)


def test_agreement_of_label_maps_is_that_of_pixels() -> None:
    ours = np.array([[1, 2], [3, 4]], np.uint16)
    assert agreement(Prediction(semantic=ours), Prediction(semantic=ours.T.copy())) == (2, 4)


def test_agreement_of_panoptic_maps_looks_at_classes_not_at_numbers() -> None:
    segments = [Segment(id=c, category_id=c, area=1, bbox_xywh=(0, 0, 1, 1), iscrowd=False) for c in (5, 6)]
    ours = Prediction(panoptic=np.array([[1, 2, 0]], np.uint16), segments=tuple(segments))
    theirs = Prediction(panoptic=np.array([[2, 1, 1]], np.uint16), segments=tuple(reversed(segments)))
    assert agreement(ours, theirs) == (2, 3)


def test_agreement_of_masks_is_the_intersection_of_matched_ones() -> None:
    theirs = (_instance(0, 10), _instance(12, 4))
    assert agreement(Prediction(instances=theirs), Prediction(instances=theirs)) == (140, 140)
    narrower = (_instance(0, 8), _instance(12, 4, category=7), _instance(0, 10, score=0.2))
    assert agreement(Prediction(instances=narrower), Prediction(instances=theirs)) == (80, 100 + 40 + 40)
    assert agreement(Prediction(instances=()), Prediction(instances=())) == (0, 0)


FORMS: st.SearchStrategy[Any] = st.recursive(
    st.just("tensor"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def _with_tensors(form: Any, count: list[int]) -> Any:
    if form == "tensor":
        count[0] += 1
        return torch.tensor(count[0])
    if isinstance(form, dict):
        return {k: _with_tensors(v, count) for k, v in form.items()}
    return type(form)(_with_tensors(v, count) for v in form)


@given(FORMS)
def test_values_are_taken_apart_and_put_together(form: Any) -> None:
    value = _with_tensors(form, [0])
    tensors, found = engines.flattened(value)
    again = engines.rebuilt(json.loads(json.dumps(found)), iter(tensors))
    assert engines.flattened(again) == (tensors, found)
    assert [int(t) for t in tensors] == list(range(1, len(tensors) + 1))


@given(st.lists(st.floats(-200, 100, width=32), min_size=1, max_size=6), st.integers(0, 2**31))
def test_probabilities_are_those_of_numpy(spread: list[float], seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(len(spread), 3, 4)) + np.array(spread)[:, None, None]
    scores = scores.astype(np.float32)
    classes, sums, pixels = np.empty((3, 4), np.uint16), np.zeros(len(spread)), np.zeros(len(spread), np.int64)
    certainty = np.empty((0, 0), np.uint8)
    grid = (1.0, 0.5)
    assert kernels.upsample_argmax(scores, grid, grid, True, classes, sums, pixels, certainty)
    exact = np.exp(scores.astype(np.float64) - scores.max(0))
    assert np.array_equal(classes, scores.argmax(0)) and pixels.sum() == 12
    share = 1 / exact.sum(0)
    for k in range(len(spread)):
        assert sums[k] == pytest.approx(share[classes == k].sum(), rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_scores_that_are_no_numbers_are_seen(soft: bool, channel: int) -> None:
    scores = np.ones((3, 4, 40), np.float32)
    scores[channel, 2, 17] = np.nan
    arrays = np.empty((4, 40), np.uint16), np.zeros(3), np.zeros(3, np.int64), np.empty((0, 0), np.uint8)
    assert not kernels.upsample_argmax(scores, (1.0, 0.5), (1.0, 0.5), soft, *arrays)


# -- a run -----------------------------------------------------------------------------------------------------------


def _model(root: Path) -> str:
    torch.manual_seed(0)
    config = UNetConfig(width=4, depth=3)
    checkpoint.write(str(root / "model"), UNet(config, 3), "unet", config, THREE, {"steps": 1})
    return f"unet@{root / 'model'}"


def _predicted(root: Path, **inference: Any) -> dict[str, Any]:
    options = RunOptions(engine=EngineConfig(kind="inline", threads=1), inference=ExecutionConfig(**inference))
    api.predict(_model(root), str(root / "photos"), str(root / "out"), options=options)
    document: dict[str, Any] = json.loads((root / "out/.segbatch/execution.json").read_text())
    return document


def test_a_small_run_is_as_it_always_was(tmp_path: Path) -> None:
    photos.folder(tmp_path / "photos", 3)
    found = _predicted(tmp_path)
    assert Execution.from_json(found["execution"]).plain
    assert found["said"] == "computing in float32 on the cpu: 3 photos are not worth measuring"


def test_what_was_decided_holds_for_whoever_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos.folder(tmp_path / "photos", 3)
    monkeypatch.setattr(execution, "MIN_PHOTOS", 1)
    monkeypatch.setattr(execution, "_WORTH_S", 0.0)
    first = _predicted(tmp_path, engine="openvino", min_agreement=0.0)
    assert first["execution"]["engine"] == "openvino"
    photos.folder(tmp_path / "photos", 2, first=10)
    monkeypatch.setattr(execution, "decide", lambda *_: pytest.fail("decided twice"))
    assert _predicted(tmp_path) == first  # who says nothing goes on as the root was begun
    assert api.retry(str(tmp_path / "out")).state.rows == 5
    with pytest.raises(ConfigError, match=r"inference\.engine: 'openvino' -> 'eager'"):
        _predicted(tmp_path, engine="eager", min_agreement=0.0)


def test_the_driver_that_came_second_adopts_the_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos.folder(tmp_path / "photos", 3)
    other = Execution(batch_size=3, why="the other driver's")

    def decided(run: Any, *_: Any) -> Execution:
        text = json.dumps({"execution": other.to_json()})
        (Path(run.root.removeprefix("file://")) / ".segbatch/execution.json").write_text(text)
        return Execution(batch_size=7)

    monkeypatch.setattr(calibrate, "_decided", decided)
    assert _predicted(tmp_path)["execution"]["batch_size"] == 3


def test_an_output_of_an_earlier_version_goes_on_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos.folder(tmp_path / "photos", 2)
    _predicted(tmp_path, dtype="float32")
    (tmp_path / "out/.segbatch/execution.json").unlink()
    photos.folder(tmp_path / "photos", 2, first=10)
    monkeypatch.setattr(execution, "MIN_PHOTOS", 1)
    found = _predicted(tmp_path)
    assert found["execution"]["why"] == "as this output was begun"
    assert jobs.job_of(str(tmp_path / "out")).config["dtype"] == "float32"
