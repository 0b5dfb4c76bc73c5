"""Configuration: frozen pydantic models, read from TOML, changed by ``--set a.b=c``; nothing is ever evaluated."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from segbatch.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanConfig(Config):
    """How inputs are cut into shards.

    Attributes:
        shard_rows: rows of a shard; 0: ``usual_rows``, fewer when the whole input is small.
        shard_bytes: a shard's inputs are not much larger.
        usual_rows: rows of a shard of a large input, while nothing is known of the work.
        shard_seconds: later plans of a run root cut shards that take about so long, by what earlier rows took.
    """

    shard_rows: int = Field(default=0, ge=0)
    shard_bytes: int = Field(default=128 << 20, gt=0)
    usual_rows: int = Field(default=256, ge=1)
    shard_seconds: float = Field(default=120.0, gt=0)


class EngineConfig(Config):
    """How shards are worked on; nothing here changes a result.

    Attributes:
        kind: ``ray``, ``inline`` (in this process), or ``auto``: Ray for predict, and for the other verbs where a
            cluster is named by RAY_ADDRESS or the input is large.
        actors: number of actors: ``min_actors`` and ``max_actors`` at once; 0 leaves it to them.
        min_actors, max_actors: bounds of the number of actors, which follows the machines of the cluster as they join
            and leave (one CPU stays free); those without work are let go. ``max_actors`` 0: as many as fit.
        gpus_per_actor: GPUs of one actor, a fraction where several share one; 0: one, where the model computes on a
            GPU and the cluster has some.
        threads: threads of an actor for decoding and encoding; 0 picks it.
        in_flight: shards in flight per actor.
        attempts: how often a shard may fail before the run stops.
        speculate: a shard that takes so many times as long as the others, row for row, is begun a second time when an
            actor has nothing else to do; the first to finish counts. 0: never.
        hang_s: an actor that does nothing for a shard for so long is ended, and what it had in hand is looked at image
            by image with that limit; the one that hangs is quarantined.
        stall_s: no finished row for so long is an error.
        drain_s: after SIGTERM, how long shards in flight may finish.
    """

    kind: Literal["auto", "ray", "inline"] = "auto"
    actors: int = Field(default=0, ge=0)
    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=0, ge=0)
    gpus_per_actor: float = Field(default=0.0, ge=0)
    threads: int = Field(default=0, ge=0)
    in_flight: int = Field(default=2, ge=1)
    attempts: int = Field(default=3, ge=1)
    speculate: float = Field(default=3.0, ge=0)
    hang_s: float = Field(default=300.0, gt=0)
    stall_s: float = Field(default=900.0, gt=0)
    drain_s: float = Field(default=30.0, ge=0)

    @model_validator(mode="after")
    def _bounds_fit(self) -> "EngineConfig":
        if self.actors and (self.max_actors or self.min_actors > 1):
            raise ValueError("actors sets min_actors and max_actors: give either it or them")
        if self.max_actors and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors is {self.max_actors}, less than min_actors, {self.min_actors}")
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError("gpus_per_actor is a fraction below 1, or a whole number")
        return self


class ExecutionConfig(Config):
    """In which number format and by which engine a model computes; ``auto`` is measured once for each run root.

    Attributes:
        device: ``cpu``, ``cuda``, or ``auto``: the GPU where the driver's machine has one that torch can use.
        dtype: ``float32``, ``bfloat16``, ``float16`` (on a GPU), or ``auto``: the fastest that agrees with float32.
        engine: ``eager`` (torch as it is), ``openvino`` (on a CPU), ``inductor`` (torch.compile), ``cudagraphs`` (on a
            GPU: full batches of a semantic network), or ``auto``: the fastest; on a GPU that is ``eager``.
        min_agreement: on a smaller share of the pixels of some of the input's own photos no format or engine may agree
            with float32 in torch.
        decode: ``full``; or ``scaled``: a JPEG with at least four times the pixels, along each side, of what the model
            is fed is decoded at 1/2, 1/4 or 1/8 of its size. Two to three times as fast, and about 1 % of the pixels
            get another label; of no effect where photos are fed at their own size, in tiles, or prepared by the model.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engine: Literal["auto", "eager", "openvino", "inductor", "cudagraphs"] = "auto"
    min_agreement: float = Field(default=0.99, ge=0, le=1)
    decode: Literal["full", "scaled"] = "full"


class CostConfig(Config):
    """What the machines cost; nothing here changes a result.

    Attributes:
        per_hour: price of all machines that a run uses together, for an hour; 0: unknown.
        currency: of the price.
    """

    per_hour: float = Field(default=0.0, ge=0)
    currency: str = "USD"


class RunOptions(Config):
    """What ``--set`` reaches in the verbs that run shards."""

    cost: CostConfig = CostConfig()

    plan: PlanConfig = PlanConfig()
    engine: EngineConfig = EngineConfig()
    inference: ExecutionConfig = ExecutionConfig()


C = TypeVar("C", bound=BaseModel)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean x?`` or nothing, for error messages."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1) or [n for n in names if word and n.startswith(word)]
    return f"; did you mean {close[0]}?" if close else ""


def parse(model: type[C], data: dict[str, Any], where: str) -> C:
    """Validate ``data``.

    Raises:
        ConfigError: naming every wrong key or value, and the nearest known key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(model, dict(e)) for e in error.errors())) from error


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    path = [str(p) for p in error["loc"]]
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        return f"unknown key {dotted}{nearest(path[-1], known)} (known: {', '.join(sorted(known))})"
    if error["type"] == "missing":
        return f"{dotted} is missing"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(
        error.get("input"), dict
    ):  # keys that do not fit together: the message names them
        return f"{dotted}: {said}" if dotted else str(said)
    return f"{dotted} = {error.get('input')!r}: {said}"


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> set[str]:
    """Keys of the (nested) model at ``path``; members of a union by ``kind`` are put together."""
    models: list[Any] = [model]
    for step in path:
        below = [m.model_fields[step].annotation for m in models if step in m.model_fields]
        models = [m for annotation in below for m in _models_in(annotation)] or models
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


def apply_sets(data: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with every ``a.b=c`` applied; ``c`` is read as a TOML value, else as a string."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    for assignment in sets:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {assignment}: not of the form key=value", "for example --set plan.shard_rows=100")
        node = result
        *parents, last = path.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {assignment}: {parent} is not a table")
        node[last] = _value(text.strip())
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def load_toml(model: type[C], uri: str, sets: Sequence[str] = ()) -> C:
    """Defaults, then the file, then ``--set``.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a wrong key or value.
    """
    return parse(model, apply_sets(read_toml(uri), sets), uri)


def read_toml(uri: str) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        ConfigError: it cannot be read, or is not TOML, with line and column.
    """
    try:
        with open(uri, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {uri}: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri} is not TOML: {error}") from error


def digest_of(document: Any) -> str:
    """16 hex digits of a JSON document's content, independent of key order."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """``key: old -> new`` of every leaf that differs."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
