"""From a folder of transformers to a ``Segmenter``: the network with its weights, and the image processor."""

import contextlib
import importlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segbatch.errors import ConfigError
from segbatch.models.hf import Model
from segbatch.models.hf_families import Family
from segbatch.models.hf_folder import EXTRA, PROCESSOR
from segbatch.models.hf_segmenter import HfSegmenter, in_short

_ONLY_TRAINING = (r"num_batches_tracked$", r"relative_position_index$", r"(^|\.)auxiliary_head\.")
"""Tensors of files that networks do not ask for: counters, tables that follow from the config, auxiliary heads."""
_READING = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError)
"""What transformers raises for folders that it cannot use."""


def segmenter_of(model: Model) -> HfSegmenter:
    """Build the network and load its weights.

    Raises:
        ConfigError: a package is missing, the folder cannot be read, or its weights do not fit (names the tensors).
    """
    reference = model.spec.name
    library = _packages(reference)
    with _quiet(library.utils.logging), model.folder.on_disk() as path, _explained(reference):
        net = _network(getattr(library, model.family.network), path, model)
        processor = _image_processor(library, path, model.family)
        text = _task_tokens(library, path, processor, model, net) if model.family.text else None
    _check_classes(net, model)
    return HfSegmenter(net, processor, model, text)


def _packages(reference: str) -> Any:
    """transformers; without torchvision its image processors would use PIL, and give other pixels."""
    for name in ("torchvision", "transformers"):
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"model {reference} needs the package {name}", EXTRA) from error
    return found


def _network(kind: Any, path: str, model: Model) -> Any:
    net, info = kind.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_fit(info, model.family, model.folder.root)
    return net.eval()


def _check_fit(info: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse weights that do not fit; the library would only warn, and run a head of random numbers.

    Args:
        info: ``output_loading_info`` of transformers.
        family: the network.
        where: the folder.
    """
    shapes = [f"{name} {tuple(there)} instead of {tuple(wanted)}" for name, there, wanted in info["mismatched_keys"]]
    problems = {
        "missing": _without(info["missing_keys"], family.unread),
        "unknown": _without(info["unexpected_keys"], _ONLY_TRAINING),
        "of another shape": sorted(shapes),
        "unreadable": sorted(map(str, info.get("error_msgs") or ())),
    }
    found = [
        f"{len(keys)} tensors {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise ConfigError(f"the weights of {where} do not fit its config.json: {'; '.join(found)}", "copy both anew")


def _without(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return sorted(n for n in names if not any(re.search(p, n) for p in patterns))


def _image_processor(library: Any, path: str, family: Family) -> Any:
    # OneFormer's class file is for training, and would be fetched from the hub
    extra = {"class_info_file": ""} if family.text else {}
    return library.AutoImageProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False, **extra)


def _task_tokens(library: Any, path: str, image_processor: Any, model: Model, net: Any) -> Tensor:
    """What OneFormer reads of its task: (1, length) token ids."""
    tokenizer = library.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    length = (model.folder.document(PROCESSOR) or {}).get("task_seq_length") or net.config.task_seq_len
    processor = library.OneFormerProcessor(image_processor, tokenizer, task_seq_length=length)
    blank = np.zeros((64, 64, 3), np.uint8)
    tokens: Tensor = processor(images=[blank], task_inputs=[model.spec.task])["task_inputs"]
    return tokens


def _check_classes(net: Any, model: Model) -> None:
    named, there = len(model.spec.classes.classes), int(net.config.num_labels)
    if named and named != there:
        raise ConfigError(f"model {model.spec.name}: {named} classes are named, it has {there}", "name all of them")


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bars and load reports of transformers'; what matters of them is raised."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Errors of transformers' as ``ConfigError``."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"model {reference} needs another package: {in_short(error)}", "pip install 'segbatch[hf,pretrained]'"
        ) from error
    except (*_READING, StrictDataclassError, SafetensorError) as error:
        raise ConfigError(
            f"model {reference} cannot be loaded: {in_short(error)}", "copy its folder anew, or check its config.json"
        ) from error
