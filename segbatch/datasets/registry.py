"""Every dataset by name. Outsiders add theirs by an entry point of the group ``segbatch.datasets``."""

import itertools

from segbatch.datasets.base import Dataset
from segbatch.datasets.tree import Tree
from segbatch.errors import ConfigError
from segbatch.plugins import Plugins

AUTO = "auto"
"""The name that stands for whichever dataset recognises the source."""

ENTRY_POINTS = "segbatch.datasets"

BUILT_IN = {
    "ade20k": "ade20k:Ade20k",
    "ade20k-full": "ade20k_full:Ade20kFull",
    "bdd100k-drivable": "bdd100k:Drivable",
    "bdd100k-ins": "bdd100k:InstanceSegmentation",
    "bdd100k-lane": "bdd100k:Lane",
    "bdd100k-pan": "bdd100k:PanopticSegmentation",
    "bdd100k-sem": "bdd100k:SemanticSegmentation",
    "camvid": "camvid:CamVid",
    "ccp": "ccp:Ccp",
    "cityscapes": "cityscapes:Cityscapes",
    "coco-instances": "coco:CocoInstances",
    "coco-panoptic": "coco:CocoPanoptic",
    "coco-stuff": "coco_stuff:CocoStuff",
    "image-masks": "image_masks:ImageMasks",
    "images": "images:Images",
    "kitti": "kitti:Kitti",
    "lits": "lits:Lits",
    "pascal-context": "pascal_context:PascalContext",
    "pascal-voc": "pascal_voc:PascalVoc",
    "pratheepan": "pratheepan:Pratheepan",
    "sku110k": "sku110k:Sku110k",
}
"""Module below ``segbatch.datasets`` and class of every built-in dataset."""

_ANY_FOLDER = "images"
"""Recognises whatever holds a photo, so ``auto`` asks it last."""

_SHOWN = 5

_DATASETS: Plugins[Dataset] = Plugins("dataset", "segbatch.datasets", BUILT_IN, ENTRY_POINTS)
names = _DATASETS.names


def dataset(name: str) -> Dataset:
    """The dataset of that name; see ``Plugins.get``."""
    return _DATASETS.get(name, also=(AUTO,))


def find(name: str, source: str) -> tuple[Dataset, Tree]:
    """The dataset of that name (``auto``: the one that recognises ``source``) and the tree that has its layout.

    Raises:
        ConfigError: an unknown name; with ``auto``: none or several recognise it; says what was seen.
    """
    tree = Tree.of(source)
    if name == AUTO:
        return recognise(tree)
    found = dataset(name)
    return found, next((t for t in tree.candidates() if found.recognises(t)), tree)


def recognise(tree: Tree) -> tuple[Dataset, Tree]:
    """The one dataset whose layout the tree has, perhaps some folders down.

    Raises:
        ConfigError: none or several; says what was seen.
    """
    specific = [dataset(n) for n in names() if n != _ANY_FOLDER]
    for below in tree.candidates():
        found = [d for d in specific if d.recognises(below)]
        if len(found) > 1:
            names_ = " and ".join(d.name for d in found)
            raise ConfigError(f"{tree.source} looks like {names_}", "name the one you mean instead of auto")
        if found:
            return found[0], below
    if dataset(_ANY_FOLDER).recognises(tree):
        return dataset(_ANY_FOLDER), tree
    known = ", ".join(names())
    raise ConfigError(f"{tree.source} is not recognised as any of {known}: {_seen(tree)}", "name the dataset")


def _seen(tree: Tree) -> str:
    if not tree.exists(""):
        return "it does not exist"
    first = [path for path, _ in itertools.islice(tree.files(), _SHOWN)]
    return f"its first files are {', '.join(first)}" if first else "it holds no file"
