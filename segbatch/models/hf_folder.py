"""Folders as transformers' ``save_pretrained`` writes them: JSON files and weights, local, remote, or by an id.

An id (``owner/name``) is looked up in, or downloaded into, huggingface_hub's own cache; with ``HF_HUB_OFFLINE=1``
nothing is downloaded. Of remote folders (``s3://``) and archives a temporary copy is made where the network is built.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from segbatch import storage
from segbatch.errors import ConfigError, ObjectMissing

EXTRA = "pip install 'segbatch[hf]'"

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
CARD = "README.md"

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The first that is there, or whose index is there, counts: transformers' _get_resolved_checkpoint_files."""
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_TEXTS = (CONFIG, PREPROCESSOR, PROCESSOR, CARD, *_TOKENIZER)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Folder:
    """A model's folder.

    Attributes:
        root: URI.
        reference: of the model, for error messages.
        repository: its id, where it came by one.
    """

    root: str
    reference: str
    repository: str = ""

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON file's content; None where there is none.

        Raises:
            ConfigError: it is no JSON object.
        """
        try:
            text = storage.read_bytes(storage.join(self.root, name))
        except ObjectMissing:
            return None
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self.root}/{name} is not JSON: {error}", "copy the folder anew") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{self.root}/{name} holds no JSON object", "copy the folder anew")
        return content

    def weights(self) -> tuple[str, ...]:
        """Names of the files of weights, in order; an index comes before its parts.

        Raises:
            ConfigError: there are none, or a part of them is missing.
        """
        for name in _WEIGHTS:
            if storage.exists(storage.join(self.root, name)):
                return (name,)
            index = self.document(f"{name}.index.json")
            if index is not None:
                return (f"{name}.index.json", *self._parts(f"{name}.index.json", index))
        raise ConfigError(
            f"model {self.reference}: {self.root} has no {' or '.join(_WEIGHTS)}",
            "give a folder that save_pretrained wrote",
        )

    def _parts(self, name: str, index: dict[str, Any]) -> list[str]:
        where = index.get("weight_map")
        parts = sorted({str(v) for v in where.values()}) if isinstance(where, dict) else []
        if not parts or any(os.path.basename(p) != p for p in parts):
            raise ConfigError(f"{self.root}/{name} names no parts in this folder", "copy the folder anew")
        missing = [p for p in parts if not storage.exists(storage.join(self.root, p))]
        if missing:
            raise ConfigError(f"model {self.reference}: {self.root} lacks {', '.join(missing)}", "copy the folder anew")
        return parts

    def digests(self, tokenizer: bool) -> dict[str, str]:
        """Hex digest by name of the files of weights and, if asked for, of the tokenizer's that are there."""
        texts = [n for n in _TOKENIZER if tokenizer and storage.exists(storage.join(self.root, n))]
        return {name: self._digest(name) for name in (*self.weights(), *texts)}

    def _digest(self, name: str) -> str:
        total = hashlib.blake2b(digest_size=16)
        with storage.open_input(storage.join(self.root, name)) as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
        return total.hexdigest()

    def card(self) -> dict[str, Any]:
        """The YAML head of the model card (README.md); empty where there is none."""
        import yaml

        try:
            text = storage.read_bytes(storage.join(self.root, CARD)).decode("utf-8", "replace")
        except ObjectMissing:
            return {}
        match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        try:
            head = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError:
            return {}  # a card is prose: what cannot be read says nothing
        return head if isinstance(head, dict) else {}

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[str]:
        """The folder as a path of this machine, for as long as the block runs."""
        if storage.is_local(self.root):
            yield self.root
            return
        with tempfile.TemporaryDirectory(prefix="segbatch-hf-") as path:
            texts = [n for n in _TEXTS if storage.exists(storage.join(self.root, n))]
            for name in (*texts, *self.weights()):
                with (
                    storage.open_input(storage.join(self.root, name)) as source,
                    open(os.path.join(path, name), "wb") as target,
                ):
                    shutil.copyfileobj(source, target, _CHUNK)
            yield path


def opened(reference: str, uri: str, revision: str) -> Folder:
    """The folder that a reference names; an id is downloaded if it is not in the cache.

    Args:
        reference: of the model, for error messages.
        uri: a folder, local or remote, or an id.
        revision: branch, tag or commit of an id; empty for the default.

    Raises:
        ConfigError: there is no such folder, or the id can be had neither from the cache nor from the hub.
    """
    root = storage.resolve(uri)
    if storage.is_folder(root):
        if revision:
            raise ConfigError(f"model {reference}: a folder has no revisions", "leave ?revision= out")
        return Folder(root, reference)
    if not _ID.fullmatch(uri):
        raise ConfigError(f"model {reference}: there is no folder {root}", "check the path")
    return Folder(_downloaded(reference, uri, revision), reference, uri)


def _downloaded(reference: str, name: str, revision: str) -> str:
    """Path of an id's snapshot in the cache."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ConfigError(f"model {reference} needs the package huggingface_hub", EXTRA) from error
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    get = partial(huggingface_hub.snapshot_download, name, revision=revision or None, local_files_only=offline)
    try:
        path = str(get(allow_patterns=[*_TEXTS, "model*.safetensors", "model*.safetensors.index.json"]))
        if not any(n.endswith(".safetensors") for n in os.listdir(path)):
            path = str(get(allow_patterns=["pytorch_model*.bin", "pytorch_model*.bin.index.json"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        problem = " ".join(str(error).split()[:40]) or type(error).__name__
        how = "HF_HUB_OFFLINE is set, so nothing is downloaded" if offline else "check the id and the network"
        raise ConfigError(f"model {reference}: no folder {name}, and no such id: {problem}", how) from error
    return path
