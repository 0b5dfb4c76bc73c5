"""Training: ``train(config)`` turns a samples table into a checkpoint folder.

``config`` is a ``TrainConfig``; torch is imported only once ``train`` runs.
"""

from collections.abc import Callable

from segbatch.models.waiting import wait_passively
from segbatch.training.config import TrainConfig
from segbatch.training.result import TrainProgress, TrainResult

__all__ = ["TrainConfig", "TrainProgress", "TrainResult", "train"]


def train(
    config: TrainConfig,
    on_progress: Callable[[TrainProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a model, or go on with a training that was interrupted; see ``segbatch.training.run.train``."""
    wait_passively()  # before torch is imported
    from segbatch.training.run import train as run_training

    return run_training(config, on_progress, should_stop)
