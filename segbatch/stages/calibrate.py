"""How a run's model computes: decided once for each run root, on some of its own photos, and kept for whoever resumes.

``.segbatch/execution.json`` is put-if-absent, so all drivers and workers of a root compute in the same way. The driver
measures, on one core: its processor should be like the workers'. GPUs are measured where workers would compute.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

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

T = TypeVar("T")

_SHARDS = 4
_MOST_BYTES = 256 << 20
"""Of decoded photos; two are looked at in any case."""
_FOR_GPUS = 4
"""Photos that are sent to where there is a GPU."""


class Machines(Protocol):
    """What the workers will compute on; see ``engine.base.Engine``."""

    def has_gpus(self) -> bool:
        """Whether a worker can have a GPU."""
        ...

    def on_gpu(self, ask: Callable[[], T]) -> T:
        """What ``ask`` says where a worker would compute."""
        ...


def settled(
    run: Run,
    todo: Shards,
    model: ModelSource,
    wanted: ExecutionConfig,
    max_pixels: int,
    say: Callable[[str], None],
    machines: Machines,
) -> Execution:
    """How this root computes: as it was decided, or decided now.

    Args:
        run: whose root.
        todo: what is to be done, at least one shard.
        model: the model.
        wanted: what the user said; heeded where nothing has been decided yet.
        max_pixels: larger photos are not looked at.
        say: told of a new decision.
        machines: those of the run.

    Raises:
        ConfigError: what is wanted cannot be had; see ``execution.decide``.
    """
    uri = service(run.root, "execution.json")
    found = _read(uri)
    if found is not None:
        return found
    decided = _decided(run, todo, model, wanted, max_pixels, machines)
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


def _decided(
    run: Run, todo: Shards, model: ModelSource, wanted: ExecutionConfig, max_pixels: int, machines: Machines
) -> Execution:
    asked = wanted.dtype in ("bfloat16", "float16") or wanted.engine not in ("auto", "eager")
    if tables.parts(storage.join(run.root, run.table)):
        return Execution(batch_size=0, why="as this output was begun")
    has_parts = bool(getattr(model, "has_parts", False))
    on_gpu = wanted.device == "cuda" or (wanted.device == "auto" and has_parts and machines.has_gpus())
    idle = "" if asked else _why_not_measured(todo, has_parts)
    if idle and not on_gpu:
        return Execution(batch_size=0, why=idle)
    with _one_thread():
        segmenter = model.load(1)
        photos = list(_photos(todo, segmenter.spec.input.slices, max_pixels))
        if not photos:
            return Execution(batch_size=0, why="none of the first photos can be read")
        if on_gpu:
            ask = functools.partial(_on_gpu, model, photos[:_FOR_GPUS], wanted)
            found = machines.on_gpu(ask) if machines.has_gpus() else ask()
            if found is not None or idle:
                return found or Execution(batch_size=0, why=idle)
        return execution.decide(segmenter, photos, todo.rows, wanted)


def _why_not_measured(todo: Shards, has_parts: bool) -> str:
    """Why a CPU need not be measured, as nobody asks for it; empty where it has to be."""
    if todo.rows < execution.MIN_PHOTOS:
        return f"{todo.rows} photos are not worth measuring"
    return "" if has_parts else "the model is run by its own runtime"


def _on_gpu(model: ModelSource, photos: Sequence[NDArray[Any]], wanted: ExecutionConfig) -> Execution | None:
    """What is decided where there is a GPU; None where torch cannot use it and nobody insists."""
    if wanted.device == "auto" and not execution.gpu_there():
        return None
    return execution.decide_on_gpu(functools.partial(model.load, 1), photos, wanted)


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
