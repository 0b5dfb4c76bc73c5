"""What an interrupted training goes on from: ``OUT/checkpoints/last.pt``, ``OUT/.segbatch/config.json``, the log."""

import io
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from segbatch import storage, tables
from segbatch.config import differences
from segbatch.errors import ConfigError, ObjectExists, ObjectMissing
from segbatch.models.checkpoint import MODEL_FILE, read_state

FORMAT = 1
_SAMPLES = ("samples", "val_samples")
_KEYS = {"format", "digest", "step", "cpu_s", "net", "average", "optimizer", "rng", "log", "losses"}


class SamplesChangedError(ConfigError):
    """The model is finished; since then samples were added, changed or removed."""


def claim(out: str, content: dict[str, Any]) -> None:
    """Write what decides the result to ``.segbatch/config.json``, or check that the same is there.

    Raises:
        SamplesChangedError: ``out`` holds the finished model of the same training on other samples.
        ConfigError: ``out`` belongs to another training, with the differences, or to an unfinished one on other
            samples.
    """
    uri = tables.service(out, "config.json")
    content = json.loads(json.dumps(content))
    try:
        storage.create(uri, json.dumps(content, indent=1, ensure_ascii=False).encode())
    except ObjectExists:
        try:
            found = json.loads(storage.read_bytes(uri))
        except ValueError as error:
            raise ConfigError(f"{uri} is not JSON: {error}", "choose another OUT") from error
        if found != content:
            raise _refusal(out, found, content) from None


def _refusal(out: str, found: Any, content: dict[str, Any]) -> ConfigError:
    """Why a training cannot have the folder of another."""
    lines = differences(found, content) if isinstance(found, dict) else ["another kind of run"]
    if any(line.partition(":")[0] not in _SAMPLES for line in lines):
        return ConfigError(
            f"{out} holds another training: {'; '.join(lines[:5])}", "choose another OUT, or undo the change"
        )
    if storage.exists(storage.join(out, MODEL_FILE)):
        return SamplesChangedError(
            f"{out} holds a model, and its samples have changed since it was trained",
            "choose another OUT, or delete it to train anew",
        )
    return ConfigError(
        f"{out} holds an unfinished training, and its samples have changed since it began",
        "delete it to begin anew, or undo the change to go on",
    )


class CpuClock:
    """CPU seconds of this process, all threads, on top of those before an interruption."""

    def __init__(self) -> None:
        self.restart(0.0)

    def restart(self, seconds: float) -> None:
        """Count on from ``seconds``."""
        self._offset = seconds - time.process_time()

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        return self._offset + time.process_time()


@dataclass(slots=True)
class Log:
    """The lines of ``log.jsonl``; the checkpoint holds them too, so that both tell the same story."""

    uri: str
    lines: list[str] = field(default_factory=list)

    def add(self, **values: Any) -> None:
        """Append a line."""
        self.lines.append(json.dumps(values))

    def save(self) -> None:
        """Replace the file."""
        storage.replace(self.uri, "".join(f"{line}\n" for line in self.lines).encode())


def last(out: str) -> str:
    """URI of the checkpoint."""
    return storage.join(out, "checkpoints", "last.pt")


def save(out: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint atomically.

    Raises:
        StorageError: it cannot be written; the old one is still there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    storage.replace(last(out), buffer.getvalue())


def load(out: str, digest: str) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none yet.

    Raises:
        ConfigError: it is cut or broken, of another format or of another training.
    """
    uri = last(out)
    try:
        data = storage.read_bytes(uri)
    except ObjectMissing:
        return None
    state: dict[str, Any] = dict(read_state(data, uri))
    if set(state) != _KEYS or state["format"] != FORMAT:
        raise ConfigError(f"{uri} is not a training checkpoint of this version", "delete it to begin anew")
    if state["digest"] != digest:
        raise ConfigError(f"{uri} belongs to another training", "delete it to begin anew, or choose another OUT")
    return state
