"""How a run's model computes: decided once for each run root, on some of its own photos, and kept for whoever resumes.

``.segbatch/execution.json`` is put-if-absent, so all drivers and workers of a root compute in the same way. The driver
measures, on one core: its processor should be like the workers'.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbatch import storage, tables
from segbatch.config import ExecutionConfig
from segbatch.errors import DataError, ObjectExists, ObjectMissing, StorageError
from segbatch.inference import execution
from segbatch.inference.execution import Execution
from segbatch.models.registry import ModelSource
from segbatch.planning import items_of
from segbatch.records import OK, ShardRef
from segbatch.runs import Run
from segbatch.shards import Shards
from segbatch.stages.inputs import decoded, inputs
from segbatch.tables import service
from segbatch.version import __version__

_SHARDS = 4
_MOST_BYTES = 256 << 20
"""Of decoded photos; two are looked at in any case."""


def settled(
    run: Run, todo: Shards, model: ModelSource, wanted: ExecutionConfig, max_pixels: int, say: Callable[[str], None]
) -> Execution:
    """How this root computes: as it was decided, or decided now.

    Args:
        run: whose root.
        todo: what is to be done, at least one shard.
        model: the model.
        wanted: what the user said; heeded where nothing has been decided yet.
        max_pixels: larger photos are not looked at.
        say: told of a new decision.

    Raises:
        ConfigError: what is wanted cannot be had; see ``execution.decide``.
    """
    uri = service(run.root, "execution.json")
    found = _read(uri)
    if found is not None:
        return found
    decided = _decided(run, todo, model, wanted, max_pixels)
    document = {"segbatch": __version__, "said": decided.said, "execution": decided.to_json()}
    try:
        storage.create(uri, json.dumps(document, indent=1).encode())
    except ObjectExists:
        return _read(uri) or decided
    if decided.trials:
        say(decided.said)
    return decided


def _read(uri: str) -> Execution | None:
    try:
        return Execution.from_json(json.loads(storage.read_bytes(uri))["execution"])
    except ObjectMissing:
        return None


def _decided(run: Run, todo: Shards, model: ModelSource, wanted: ExecutionConfig, max_pixels: int) -> Execution:
    asked = wanted.dtype in ("bfloat16", "float16") or wanted.engine not in ("auto", "eager")
    if tables.parts(storage.join(run.root, run.table)):
        return Execution(batch_size=0, why="as this output was begun")
    has_parts = bool(getattr(model, "has_parts", False))
    on_gpu = wanted.device == "cuda" or (wanted.device == "auto" and has_parts and execution.gpu_there())
    if not on_gpu and not asked and todo.rows < execution.MIN_PHOTOS:
        return Execution(batch_size=0, why=f"{todo.rows} photos are not worth measuring")
    if not on_gpu and not asked and not has_parts:
        return Execution(batch_size=0, why="the model is run by its own runtime")
    with _one_thread():
        segmenter = model.load(1)
        photos = list(_photos(todo, segmenter.spec.input.slices, max_pixels))
        if not photos:
            return Execution(batch_size=0, why="none of the first photos can be read")
        if on_gpu:
            return execution.decide_on_gpu(lambda: model.load(1), photos, wanted)
        return execution.decide(segmenter, photos, todo.rows, wanted)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Loading a model sets the threads of the whole process, which may be somebody's notebook."""
    from segbatch.models.waiting import wait_passively

    wait_passively()
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _photos(todo: Shards, slices: int, max_pixels: int) -> Iterator[NDArray[Any]]:
    """Some good photos of shards from all over the run."""
    places = np.zeros(len(todo), np.bool_)
    places[np.linspace(0, len(todo) - 1, _SHARDS).astype(np.intp)] = True
    shards = list(todo.where(places))
    each = -(-execution.MAX_CALIBRATION_PHOTOS // len(shards))
    held = 0
    for number, photo in enumerate(p for s in shards for p in itertools.islice(_good(s, slices, max_pixels), each)):
        held += photo.nbytes
        if number > 1 and held > _MOST_BYTES:
            return
        yield photo


def _good(shard: ShardRef, slices: int, max_pixels: int) -> Iterator[NDArray[Any]]:
    """The photos of a shard that can be read; a bad one will be a row that says so."""
    for photo in inputs(items_of(shard), slices):
        if photo.status != OK:
            continue
        try:
            data = photo.data if photo.data is not None else storage.read_bytes(photo.uri)
            yield decoded(photo, data, max_pixels)[0]
        except (DataError, ObjectMissing, StorageError):
            continue
