"""Networks of transformers: ``hf:FOLDER`` and ``hf:OWNER/NAME``, with ``?key=value&...`` behind it where needed.

FOLDER is what ``save_pretrained`` wrote, local or remote: config.json, weights (safetensors, or a state dict that holds
tensors alone; in parts or not) and preprocessor_config.json. OWNER/NAME is an id of the Hugging Face hub (see
``hf_folder``). Which networks: ``hf_families``. Official code: huggingface/transformers; the papers are named there, in
docs/source/en/model_doc.

Pre-processing is the folder's own image processor. So is post-processing (``post_process_semantic_segmentation``,
``_instance_``, ``_panoptic_``), but for semantic networks whose scores, taken to the photo's size here, give the same
label map: those can be tiled, mirrored and combined. What a processor cuts off (``do_center_crop``) or adds as a border
is stretched over the photo with the rest, as the library does: better switch it off in preprocessor_config.json.

Keys behind ``?``, which come before those of the side-car ``FOLDER.toml``:

- ``task``: ``semantic``, ``instance`` or ``panoptic``, where the network can do several. Where nobody says: panoptic
  for DETR; semantic if the image processor cuts photos into pieces (EoMT's ``do_split_image``); panoptic if it is
  known which classes are things and which are stuff; else it must be said.
- ``min_score``, ``mask_threshold``, ``overlap``: of instances and segments, in the place of the library's defaults
  (``threshold``, ``mask_threshold``, ``overlap_mask_area_threshold``).
- ``revision``: of an id.

Classes: ``--classes``, else the side-car, else ``id2label``; ``LABEL_0``, ``LABEL_1``, ... names nothing. Label ids are
the network's own, the keys of ``id2label``: a network trained with ``do_reduce_labels`` on ADE20K gives 0 for ADE20K's
1, unless a class list says otherwise (``label_ids``). A second class of the same name has its id behind the name.
What is stuff (not named by ``things`` or by OneFormer's class file) makes one segment of a photo; where no things are
known, none are joined, as the library does by default.

No code of the folder's is ever run: a folder that brings some (``auto_map``) is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from segbatch.config import Config, digest_of, parse
from segbatch.errors import ConfigError
from segbatch.models.base import InputSpec, ModelSpec, Output, Segmenter
from segbatch.models.classes import ClassesFile, class_table
from segbatch.models.hf_families import THRESHOLDS, Family, family_of
from segbatch.models.hf_folder import CONFIG, PREPROCESSOR, PROCESSOR, Folder, opened
from segbatch.models.side_car import Share, SideCar, check_keys, class_table_for, read_side_car
from segbatch.models.waiting import wait_passively
from segbatch.records import ClassTable, Task

_PARTS = re.compile(r"(?P<where>.+?)(?:\?(?P<keys>\w+=[^?]*))?", re.DOTALL)
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_REFUSED = {
    "auto_map": "brings code of its own, which is never run",
    "quantization_config": "is quantised",
    "transformers_weights": "names weights of its own",
}
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of config.json that may name code of the hub, as ``owner/name``."""
_ADAPTER = "adapter_config.json"
_KEYS = ("things", "task", *THRESHOLDS)


class Options(Config):
    """What may stand behind ``?``; see the module's docstring."""

    task: Task | None = None
    min_score: Share | None = None
    mask_threshold: Share | None = None
    overlap: Share | None = None
    revision: str = ""


@dataclass(frozen=True, slots=True)
class HfSource:
    """A folder or id, with keys, and, optionally, a class list."""

    what: str
    classes_uri: str = ""
    has_parts: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """``hf:FOLDER`` or ``hf:OWNER/NAME``, with its keys."""
        return f"hf:{self.what}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; an id is downloaded if it is not in the cache. Does without transformers."""
        return self._model().spec

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        wait_passively()
        import torch

        from segbatch.models.hf_network import segmenter_of

        torch.set_num_threads(threads)
        return segmenter_of(self._model())

    def _model(self) -> "Model":
        match = _PARTS.fullmatch(self.what)
        if match is None:
            raise ConfigError(f"model {self.reference} names no folder", "give it as hf:FOLDER or hf:OWNER/NAME")
        pairs = [p.partition("=") for p in (match["keys"] or "").split("&") if p]
        options = parse(Options, {key: value for key, _, value in pairs}, f"model {self.reference}")
        return Model.of(opened(self.reference, match["where"], options.revision), options, self.classes_uri)


@dataclass(frozen=True, slots=True)
class Model:
    """A folder, read and checked, the network not yet built.

    Attributes:
        folder: where it lies.
        family: what network it is.
        config, preprocessor: content of config.json and of the image processor's file.
        thresholds: those that the user chose, by segbatch's names.
        spec: what it is and wants.
    """

    folder: Folder
    family: Family
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    thresholds: Mapping[str, float]
    spec: ModelSpec

    @classmethod
    def of(cls, folder: Folder, options: Options, classes_uri: str) -> "Model":
        """Everything but the network.

        Raises:
            ConfigError: the folder is incomplete, brings code, or is of no known network; or what the user chose does
                not go with it.
        """
        reference, side_car = folder.reference, read_side_car(folder.root)
        check_keys(side_car, folder.root, _KEYS)
        config = _config(folder)
        family = family_of(config, reference)
        preprocessor = _preprocessor(folder)
        own = _own_classes(folder, config, preprocessor)
        classes = class_table_for(folder.root, _channels(config), classes_uri, side_car, own)
        task = _task(options, side_car, family, preprocessor, classes, reference)
        if task != "semantic" and not classes.classes:
            raise ConfigError(
                f"model {reference} does not name its classes", f"give them with --classes or in {folder.root}.toml"
            )
        thresholds = _thresholds(options, side_car, family, task, reference)
        decides = {
            "files": folder.digests(family.text),
            "config": config,
            "preprocessor": preprocessor,
            "task": task,
            "thresholds": thresholds,
            "label_ids": [c.label_id for c in classes.classes],
            "things": [c.isthing for c in classes.classes],
        }
        spec = ModelSpec(
            name=reference,
            task=task,
            classes=classes,
            input=_input(preprocessor),
            output=_output(family, task, preprocessor),
            digest=digest_of(decides),
            licence=side_car.licence or _licence(folder),
            source=side_car.source or (f"https://huggingface.co/{folder.repository}" if folder.repository else ""),
        )
        return cls(folder, family, config, preprocessor, thresholds, spec)


def _config(folder: Folder) -> dict[str, Any]:
    """Content of config.json, once it is clear that nothing in the folder would have code run."""
    config = folder.document(CONFIG)
    if config is None:
        raise ConfigError(
            f"model {folder.reference}: {folder.root} has no {CONFIG}", "give a folder that save_pretrained wrote"
        )
    for name in (CONFIG, PREPROCESSOR, PROCESSOR, "tokenizer_config.json"):
        content = config if name == CONFIG else folder.document(name) or {}
        for key, why in _refusals(content):
            raise ConfigError(
                f"model {folder.reference} {why}: {key} in {name}", "export it to ONNX, and use onnx:FILE instead"
            )
    if folder.document(_ADAPTER) is not None:
        raise ConfigError(f"model {folder.reference} is an adapter: {_ADAPTER}", "merge it into its network first")
    return config


def _refusals(content: Any) -> Iterator[tuple[str, str]]:
    """(key, reason) of everything in a document, however deep, that is not supported for a reason."""
    if isinstance(content, list):
        for value in content:
            yield from _refusals(value)
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in _REFUSED and value:
                yield key, _REFUSED[key]
            elif key in _KERNELS and "/" in str(value):
                yield key, _REFUSED["auto_map"]
            else:
                yield from _refusals(value)


def _preprocessor(folder: Folder) -> dict[str, Any]:
    """What ``AutoImageProcessor`` reads: a processor's own file counts before the image processor's."""
    nested = (folder.document(PROCESSOR) or {}).get("image_processor")
    found = nested if isinstance(nested, dict) else folder.document(PREPROCESSOR)
    if found is None:
        raise ConfigError(
            f"model {folder.reference}: {folder.root} has no {PREPROCESSOR}, so nobody knows what to feed it",
            "write the one it was trained with: AutoImageProcessor's save_pretrained(FOLDER)",
        )
    return found


def _channels(config: Mapping[str, Any]) -> int | None:
    """How many classes the network has, where config.json says."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, Mapping) and labels else None


def _own_classes(folder: Folder, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ClassTable:
    """``id2label``; empty where it is not there or holds placeholders alone.

    Raises:
        ConfigError: its keys are not 0, 1, 2, ...
    """
    labels = config.get("id2label") or {}
    if not isinstance(labels, Mapping) or sorted(map(str, labels)) != sorted(map(str, range(len(labels)))):
        raise ConfigError(f"{folder.root}/{CONFIG}: the keys of id2label are not 0, 1, 2, ...", "number all classes")
    names = [str(labels[str(i)]) for i in range(len(labels))]
    if all(_PLACEHOLDER.fullmatch(n) for n in names):
        return ClassTable(())
    unique = tuple(f"{n} ({i})" if n in names[:i] else n for i, n in enumerate(names))
    table = class_table(ClassesFile(classes=unique), f"{folder.root}/{CONFIG}: id2label")
    things = _thing_ids(folder, preprocessor)
    return ClassTable(tuple(replace(c, isthing=c.label_id in things) for c in table.classes))


def _thing_ids(folder: Folder, preprocessor: Mapping[str, Any]) -> set[int]:
    """Things by OneFormer's class file, which is in the image processor's file or beside it; else none."""
    inside = preprocessor.get("metadata")
    if isinstance(inside, Mapping) and isinstance(inside.get("thing_ids"), list):
        return {int(i) for i in inside["thing_ids"]}
    name = str(preprocessor.get("class_info_file") or "")
    beside = folder.document(name) if name.endswith(".json") and "/" not in name else None
    rows = (beside or {}).items()
    return {int(k) for k, v in rows if str(k).isdigit() and isinstance(v, Mapping) and v.get("isthing")}


def _task(
    options: Options,
    side_car: SideCar,
    family: Family,
    preprocessor: Mapping[str, Any],
    classes: ClassTable,
    reference: str,
) -> Task:
    """See the module's docstring."""
    said = options.task or side_car.task
    pieces = bool(preprocessor.get("do_split_image"))
    tasks: tuple[Task, ...] = ("semantic",) if pieces else family.tasks
    if said:
        if said not in tasks:
            why = " on photos that its image processor cuts into pieces" if pieces else ""
            raise ConfigError(
                f"model {reference}: {family.network} has no task {said}{why}", f"it has: {', '.join(tasks)}"
            )
        return said
    if family.default:
        return family.default
    if pieces:
        return "semantic"
    if {c.isthing for c in classes.classes} == {True, False}:
        return "panoptic"
    raise ConfigError(
        f"model {reference}: nothing says what {family.network} was trained for",
        f"add ?task= and one of {', '.join(family.tasks)}",
    )


def _thresholds(options: Options, side_car: SideCar, family: Family, task: Task, reference: str) -> dict[str, float]:
    said = {k: getattr(side_car, k) if getattr(options, k) is None else getattr(options, k) for k in THRESHOLDS}
    chosen = {k: float(v) for k, v in said.items() if v is not None}
    unknown = [k for k in chosen if k not in family.known(task)]
    if unknown:
        raise ConfigError(
            f"model {reference}: {family.network} has no {', '.join(unknown)} for the {task} task",
            f"it has: {', '.join(family.known(task)) or 'none'}",
        )
    return chosen


def _output(family: Family, task: Task, preprocessor: Mapping[str, Any]) -> Output:
    whole = not preprocessor.get("do_split_image")
    return family.semantic if task == "semantic" and whole else "own"


def _input(preprocessor: Mapping[str, Any]) -> InputSpec:
    """Height and width where the image processor makes all photos of one size."""
    cropped = preprocessor.get("do_center_crop")
    size = preprocessor.get("crop_size" if cropped else "size") if cropped or preprocessor.get("do_resize") else None
    free = InputSpec(resize="own")
    if not isinstance(size, Mapping) or preprocessor.get("keep_aspect_ratio"):
        return free
    height, width = size.get("height"), size.get("width")
    fixed = isinstance(height, int) and isinstance(width, int)
    return InputSpec(height=height, width=width, resize="own") if fixed else free


def _licence(folder: Folder) -> str:
    """The model card's licence; its name where that is ``other``."""
    card = folder.card()
    said = card.get("license") or ""
    if said == "other":
        said = card.get("license_name") or said
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)
