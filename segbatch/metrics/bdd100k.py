"""What the protocols of BDD100K share.

Source: github.com/bdd100k/bdd100k (commit 9ac17c6, version 1.0.1), ``bdd100k/eval``: the evaluation of masks and
bitmasks, which is what the server runs. The JSON files of RLE take another road there, through scalabel, whose figures
differ from these in places.
"""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

from segbatch.errors import ConfigError, DataError
from segbatch.metrics.base import Row
from segbatch.records import ClassTable

_SHOWN = 12


def official_classes(protocol: str, classes: ClassTable, scored: range) -> ClassTable:
    """The class table by ascending label id, in which order the official code adds up.

    Args:
        protocol: its name.
        classes: of the samples.
        scored: the label ids that the protocol is made for.

    Raises:
        ConfigError: other label ids; says which are wanted, and which are there.
    """
    found = sorted(c.label_id for c in classes.scored)
    if found != list(scored):
        shown = ", ".join(map(str, found[:_SHOWN])) + (" ..." if len(found) > _SHOWN else "")
        problem = (
            f"protocol {protocol} wants the classes {scored[0]} to {scored[-1]}, the samples have {shown or 'none'}"
        )
        raise ConfigError(problem, f"evaluate samples of the dataset {protocol}, or choose another protocol")
    return ClassTable(tuple(sorted(classes.classes, key=lambda c: c.label_id)))


def ignored_ids(truth: Row, kind: Literal["instances", "segments"]) -> frozenset[int]:
    """Ids of the objects whose attribute "ignored" is set in the bitmask (bit 1).

    Args:
        truth: a row of samples; its ``attributes`` hold those of each object under ``kind``.
        kind: ``instances`` or ``segments``.

    Raises:
        DataError: ``bad-annotation``: the attributes are not what ingest writes.
    """
    text = truth.text("attributes")
    if not text:
        return frozenset()
    try:
        objects = (json.loads(text) or {}).get(kind) or {}
        return frozenset(int(number) for number, flags in objects.items() if flags.get("ignored"))
    except (ValueError, AttributeError, RecursionError) as error:
        problem = f"sample {truth.text('sample_id')}: the attributes of its {kind} cannot be read: {error}"
        raise DataError(problem, "ingest it again", "bad-annotation") from error


def unknown_class(row: Row, what: str, label_ids: Iterable[int]) -> DataError:
    """The error of an object whose class the samples lack."""
    number = min(label_ids)
    problem = f"sample {row.text('sample_id')}: the {what} has an object of class {number}, which the samples lack"
    return DataError(problem, "give objects the samples' own label ids", "unknown-class")


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """A loop of ``_bdd100k_kernels``."""
    from segbatch.metrics import _bdd100k_kernels as kernels  # slow to import, so not before it is needed

    return kernels.kernel(getattr(kernels, name))
