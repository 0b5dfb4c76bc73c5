"""Run, train and score segmentation models over whole datasets in object storage.

The verbs are imported when they are used, so that ``import segbatch`` costs nothing in an actor.
"""

from typing import TYPE_CHECKING, Any

from segbatch.version import __version__

if TYPE_CHECKING:
    from segbatch.api import (
        compact,
        compare,
        evaluate,
        gc,
        ingest,
        predict,
        query,
        report,
        retry,
        status,
        train,
        verify,
    )
    from segbatch.pipeline import run_pipeline

__all__ = [
    "__version__",
    "compact",
    "compare",
    "evaluate",
    "gc",
    "ingest",
    "predict",
    "query",
    "report",
    "retry",
    "run_pipeline",
    "status",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from segbatch import api, pipeline

        return getattr(pipeline if name == "run_pipeline" else api, name)
    raise AttributeError(f"module 'segbatch' has no attribute {name!r}")
