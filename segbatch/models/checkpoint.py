"""A trained model's folder: ``model.json`` (what it is) and ``weights.pt`` (a state dict).

Nothing in it is ever executed: weights are loaded with ``weights_only``, and what is built follows from ``model.json``
through ``ARCHITECTURES``. ``weights.pt`` is written first; ``model.json`` holds its digest, so a half-written or
mixed-up folder is noticed.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from segbatch import storage
from segbatch.config import Config, digest_of, parse
from segbatch.errors import ConfigError, ObjectMissing
from segbatch.models.architectures import Architecture, architecture_of
from segbatch.models.base import ModelSpec, Segmenter
from segbatch.models.waiting import wait_passively
from segbatch.records import ClassTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

FORMAT = 1
MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.pt"


class ModelFile(Config):
    """Content of ``model.json``.

    Attributes:
        format: version of this layout.
        architecture: key of ``ARCHITECTURES``.
        config: the architecture's configuration.
        classes: ``ClassTable.to_json`` of the network's outputs, in their order.
        training: how it came to be (data, steps, seed, figures); no influence on the output.
        weights_digest: hex digest of ``weights.pt``.
        licence, source: of the weights.
    """

    format: int = Field(default=FORMAT, le=FORMAT)
    architecture: str
    config: dict[str, Any]
    classes: list[dict[str, Any]]
    training: dict[str, Any] = Field(default_factory=dict)
    weights_digest: str
    licence: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's content, read and checked, the network not yet built.

    Attributes:
        uri: the folder.
        file: ``model.json``.
        weights: bytes of ``weights.pt``.
    """

    uri: str
    file: ModelFile
    weights: bytes

    @property
    def architecture(self) -> Architecture:
        """Its entry in ``ARCHITECTURES`` or among the entry points."""
        return architecture_of(self.file.architecture, self.uri)

    @property
    def classes(self) -> ClassTable:
        """The network's outputs in their order."""
        return ClassTable.from_json(self.file.classes)

    @property
    def config(self) -> Any:
        """The architecture's configuration, validated."""
        return parse(self.architecture.config, self.file.config, f"{self.uri}/{MODEL_FILE}: config")

    def spec(self, name: str, classes: ClassTable | None = None) -> ModelSpec:
        """Everything but the weights.

        Args:
            name: the reference that the user gave.
            classes: another class table for the same outputs.

        Raises:
            ConfigError: ``classes`` has another length.
        """
        table = self.classes if classes is None else classes
        if len(table.classes) != len(self.file.classes):
            raise ConfigError(
                f"{len(table.classes)} classes were given for {name}, which has {len(self.file.classes)}",
                "give one for each of: " + ", ".join(c.name for c in self.classes.classes),
            )
        architecture, config = self.architecture, self.config
        decides = {
            "format": self.file.format,
            "architecture": self.file.architecture,
            "config": config.model_dump(mode="json"),
            "label_ids": [c.label_id for c in table.classes],
            "weights": self.file.weights_digest,
        }
        return ModelSpec(
            name=name,
            task=architecture.task,
            classes=table,
            input=architecture.input_spec(config),
            output=architecture.output,
            choice=architecture.choice,
            digest=digest_of(decides),
            licence=self.file.licence,
            source=self.file.source,
        )

    def network(self) -> "torch.nn.Module":
        """Build the network and put the weights in.

        Raises:
            ConfigError: the weights cannot be read or do not fit, naming the tensors.
        """
        net = self.architecture.build(self.config, self.classes)
        load_state(net, read_state(self.weights, f"{self.uri}/{WEIGHTS_FILE}"), self.uri)
        return net

    def segmenter(self, spec: ModelSpec, threads: int) -> Segmenter:
        """The network ready for inference with ``threads`` torch threads (a setting of the whole process)."""
        wait_passively()
        import torch

        torch.set_num_threads(threads)
        return self.architecture.segmenter(self.network(), spec)


def weights_digest(data: bytes) -> str:
    """Hex digest of a weights file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write(
    uri: str, net: "torch.nn.Module", architecture: str, config: Any, classes: ClassTable, training: dict[str, Any]
) -> None:
    """Write a checkpoint folder, replacing what is there.

    Raises:
        StorageError: it cannot be written.
    """
    import torch

    buffer = io.BytesIO()
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    torch.save(state, buffer)
    data = buffer.getvalue()
    file = ModelFile(
        architecture=architecture,
        config=config.model_dump(mode="json"),
        classes=classes.to_json(),
        training=training,
        weights_digest=weights_digest(data),
    )
    storage.replace(storage.join(uri, WEIGHTS_FILE), data)
    text = json.dumps(file.model_dump(mode="json"), indent=1, ensure_ascii=False)
    storage.replace(storage.join(uri, MODEL_FILE), text.encode())


def read(uri: str) -> Checkpoint:
    """Read a checkpoint folder and check that its parts belong together.

    Raises:
        ConfigError: not a checkpoint folder, of a newer format, or cut or mixed up.
        StorageError: it cannot be read.
    """
    uri = storage.resolve(uri)
    try:
        text = storage.read_bytes(storage.join(uri, MODEL_FILE))
        weights = storage.read_bytes(storage.join(uri, WEIGHTS_FILE))
    except ObjectMissing as error:
        raise ConfigError(
            f"{uri} is not a trained model: {error.problem}", "give the OUT folder of `segbatch train CONFIG.toml OUT`"
        ) from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{uri}/{MODEL_FILE} is not JSON: {error}", "train the model again, or copy its folder anew"
        ) from error
    file = parse(ModelFile, content, f"{uri}/{MODEL_FILE}")
    if weights_digest(weights) != file.weights_digest:
        raise ConfigError(
            f"{uri}/{WEIGHTS_FILE} is cut, changed or of another model: its digest is not the one in {MODEL_FILE}",
            "copy the folder anew",
        )
    return Checkpoint(uri, file, weights)


def read_state(data: bytes, where: str) -> "Mapping[str, torch.Tensor]":
    """A state dict from bytes; only tensors are ever unpickled.

    Raises:
        ConfigError: it is not one.
    """
    import pickle

    import torch

    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{where} is not a readable torch file: {problem}", "copy it anew, or delete it and train again"
        ) from error
    if not isinstance(state, dict):
        raise ConfigError(f"{where} holds a {type(state).__name__}, not a dictionary of tensors")
    return state


def load_state(net: "torch.nn.Module", state: "Mapping[str, torch.Tensor]", where: str) -> None:
    """Put weights into a network, every tensor of both.

    Raises:
        ConfigError: naming the tensors that are missing, too many, or of another shape.
    """
    wanted = net.state_dict()
    problems = {
        "missing": [k for k in wanted if k not in state],
        "unknown": [k for k in state if k not in wanted],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
            for k, v in wanted.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    found = [
        f"{len(keys)} tensors {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise ConfigError(
            f"the weights of {where} do not fit its architecture: {'; '.join(found)}",
            "they belong to another configuration",
        )
    net.load_state_dict(dict(state))
