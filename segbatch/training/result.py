"""What a training tells while it runs and when it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """State after a step.

    Attributes:
        step: optimiser steps so far (colour classifier: photos).
        fraction: 0..1 of the epochs or of the CPU time.
        loss: mean over the steps since the last report; 0 where there is none.
        lr: learning rate of this step.
        images: training crops seen so far.
        cpu_s: CPU seconds so far, those before an interruption included.
    """

    step: int
    fraction: float
    loss: float
    lr: float
    images: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training.

    Attributes:
        uri: the checkpoint folder.
        reference: what ``predict`` takes: ``name@uri``.
        steps: optimiser steps (colour classifier: photos).
        samples: photos trained on.
        skipped: rows of the samples table that were left out because their status is not ok, by status.
        loss: mean training loss at the end; None for the colour classifier.
        cpu_s: CPU seconds, all threads, interruptions and validation included.
        resumed_from: step that this call began at.
        val_miou: mean IoU of the validation photos, see ``validation``; None without any.
        val_iou: IoU by class name; None for a class that neither truth nor prediction shows.
        val_ap, val_ap50: mask AP of instance networks on the validation photos: over IoU .5 to .95, and at .5.
        val_pq: panoptic quality of panoptic networks.
    """

    uri: str
    reference: str
    steps: int
    samples: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    loss: float | None = None
    cpu_s: float = 0.0
    resumed_from: int = 0
    val_miou: float | None = None
    val_iou: Mapping[str, float | None] = field(default_factory=dict)
    val_ap: float | None = None
    val_ap50: float | None = None
    val_pq: float | None = None
