"""Every dataset by name. Outsiders add theirs by an entry point of the group ``segbatch.datasets``."""

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from segbatch import storage
from segbatch.config import nearest
from segbatch.datasets.base import Dataset
from segbatch.datasets.camvid import CamVid
from segbatch.datasets.image_masks import ImageMasks
from segbatch.datasets.images import Images
from segbatch.errors import ConfigError

AUTO = "auto"
"""The name that stands for whichever dataset recognises the source."""

ENTRY_POINTS = "segbatch.datasets"

DATASETS: dict[str, Dataset] = {d.name: d for d in (CamVid(), ImageMasks(), Images())}

_ANY_FOLDER = Images.name
"""Recognises whatever holds a photo, so ``auto`` asks it last."""

_SHOWN = 5


def names() -> tuple[str, ...]:
    """Built-in and installed datasets, in alphabetical order."""
    return tuple(sorted({*DATASETS, *_plugins()}))


def dataset(name: str, source: str = "") -> Dataset:
    """The dataset of that name; ``auto`` looks at ``source``.

    Raises:
        ConfigError: an unknown name, with the known ones and the nearest; or see ``recognise``.
    """
    if name == AUTO:
        return recognise(source)
    if name in DATASETS:
        return DATASETS[name]
    plugins = _plugins()
    if name in plugins:
        return _load(plugins[name])
    known = ", ".join([*names(), AUTO])
    raise ConfigError(f"unknown dataset {name!r}{nearest(name, [*names(), AUTO])}", f"known: {known}")


def recognise(source: str) -> Dataset:
    """The one dataset whose layout ``source`` has.

    Raises:
        ConfigError: none or several; says what was seen.
    """
    specific = [n for n in names() if n != _ANY_FOLDER]
    found = [n for n in specific if dataset(n).recognises(source)]
    if len(found) > 1:
        raise ConfigError(f"{source} looks like {' and '.join(found)}", "name the one you mean instead of auto")
    if found:
        return dataset(found[0])
    if DATASETS[_ANY_FOLDER].recognises(source):
        return DATASETS[_ANY_FOLDER]
    raise ConfigError(f"{source} is not recognised as any of {', '.join(names())}: {_seen(source)}", "name the dataset")


def _seen(source: str) -> str:
    if not storage.exists(source):
        return "it does not exist"
    first = [storage.relative(i.uri, source) for i, _ in zip(storage.list_files(source), range(_SHOWN), strict=False)]
    return f"its first files are {', '.join(first)}" if first else "it holds no file"


def _plugins() -> dict[str, EntryPoint]:
    """Entry points by name; a built-in name cannot be taken."""
    return {e.name: e for e in entry_points(group=ENTRY_POINTS) if e.name not in DATASETS}


def _load(plugin: EntryPoint) -> Dataset:
    try:
        found = plugin.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"dataset {plugin.name!r} ({plugin.value}) cannot be loaded: {error}", "reinstall it"
        ) from error
    return cast(Dataset, found() if isinstance(found, type) else found)
