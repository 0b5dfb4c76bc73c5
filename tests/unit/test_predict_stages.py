"""What a shard's photos go through: read ahead by all readers whatever the batches, split where the model fails."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from segbatch.records import OK
from segbatch.stages import predict
from segbatch.stages.inputs import Input
from segbatch.stages.predict import PHOTOS_AHEAD, READERS, PhotoRow, PredictWorker, read_ahead


@pytest.mark.parametrize("size", [1, 4, 6, 32, 64])
def test_all_readers_have_something_to_do(size: int) -> None:
    together = threading.Barrier(READERS)

    def read(photos: list[Input]) -> list[str]:
        together.wait(timeout=20)
        return [p.sample_id for p in photos]

    photos = [Input(str(i), None, f"s3://b/{i}", "") for i in range(size * 4 * READERS)]
    with ThreadPoolExecutor(READERS) as readers:
        chunks = [[i for part in parts for i in part] for parts in read_ahead(readers, read, photos, size)]
    assert [i for chunk in chunks for i in chunk] == [p.sample_id for p in photos]
    assert {len(chunk) for chunk in chunks} == {size}


def test_no_more_is_read_ahead_than_is_said() -> None:
    begun: list[str] = []

    def read(photos: list[Input]) -> int:
        begun.extend(p.sample_id for p in photos)
        return len(photos)

    photos = (Input(str(i), None, f"s3://b/{i}", "") for i in range(10_000))
    with ThreadPoolExecutor(READERS) as readers:
        stream = read_ahead(readers, read, photos, 8)
        assert next(stream) == [4, 4]
        stream.close()
    assert len(begun) <= PHOTOS_AHEAD + 3 * 8


class Activations:
    """What a call of a model holds."""


class Stub:
    """The worker's part that calls the model."""

    def __init__(self, forward: Any) -> None:
        self._predictor = SimpleNamespace(forward=forward)

    def _predict(self, rows: list[PhotoRow]) -> None:
        PredictWorker._predict(self, rows)  # type: ignore[arg-type]


def rows(count: int) -> list[PhotoRow]:
    found = [PhotoRow(Input(str(i), None, "u", "e")) for i in range(count)]
    for row in found:
        row.prepared = row.photo.sample_id  # type: ignore[assignment]
    return found


def test_a_batch_that_was_too_large_is_not_held_while_its_halves_run() -> None:
    held: list[weakref.ref[Activations]] = []
    alive: list[int] = []

    def forward(batch: list[Any]) -> list[Any]:
        alive.append(sum(r() is not None for r in held))
        here = Activations()
        held.append(weakref.ref(here))
        if len(batch) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return batch

    eight = rows(8)
    Stub(forward)._predict(eight)
    assert [r.status for r in eight] == [OK] * 8 and [r.raw for r in eight] == [str(i) for i in range(8)]
    assert alive == [0] * 7


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", False),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", False),
    ],
)
def test_a_process_ends_only_when_its_gpu_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, said: str, lost: bool
) -> None:
    def forward(batch: list[Any]) -> list[Any]:
        raise RuntimeError(said)

    def exits(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(predict.os, "_exit", exits)
    (row,) = one = rows(1)
    if lost:
        with pytest.raises(SystemExit, match="70"):
            Stub(forward)._predict(one)
        assert said in caplog.text
    else:
        Stub(forward)._predict(one)
        assert row.status == "model-error" and row.error is not None and said in row.error
