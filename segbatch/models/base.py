"""What every model is to the rest of segbatch: a ``ModelSpec`` and a ``forward``.

Pre-processing (``segbatch.inference``) follows from ``spec.input``, post-processing from ``spec.output`` and
``spec.choice``; so the engine, the evaluator and the apps know nothing of architectures. A model of somebody else's
that comes with its own pre- or post-processing says ``own`` there and brings the method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from segbatch.records import ClassTable, Prediction, Task


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the network wants to be fed.

    Attributes:
        height, width: input size where ``resize`` needs one; None for a network that takes any size.
        resize: ``none`` feeds the photo at its own size; ``stretch`` makes it (height, width); ``letterbox`` makes it
            as large as fits into (height, width), aspect ratio kept, and fills up to that size; ``short-side`` makes
            its shorter side ``height`` pixels, but its longer one at most ``longest``; ``own`` leaves it to the model's
            ``prepare`` (see ``OwnInput``).
        longest: see ``short-side``; None for no limit.
        divisor: sides are padded (bottom, right, with the mean colour) to a multiple of this; the output is cropped.
        layout: ``nhwc`` or ``nchw``.
        dtype: ``uint8`` feeds raw RGB; ``float32`` feeds ``(rgb / 255 - mean) / std``.
        mean, std: per channel, in units of 0..1.
        align_corners: how scores are up-sampled: False: pixel centres lie at half-integers; True: the corner pixels of
            scores and input coincide (TensorFlow's DeepLab).
        slices: 0 for photos. Else the network sees CT slices: an odd number of neighbouring slices as channels, the
            middle one being the one that is labelled.
        window: of CT slices: (lowest, highest) value in Hounsfield units, which become 0 and 1.
    """

    height: int | None = None
    width: int | None = None
    resize: Literal["none", "stretch", "letterbox", "short-side", "own"] = "none"
    longest: int | None = None
    divisor: int = 1
    layout: Literal["nhwc", "nchw"] = "nchw"
    dtype: Literal["uint8", "float32"] = "float32"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    align_corners: bool = False
    slices: int = 0
    window: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the detections count, how they become masks, and what is kept of a label map beside it.

    Attributes:
        min_score: detections below are dropped, 0..1.
        nms_iou: among boxes of one class that overlap by more than this, only the best stays; None where the network
            has seen to it.
        top_k: at most so many an image, the best ones.
        mask_threshold: a pixel belongs to the object where its probability is above this.
        overlap: panoptic: an instance that better ones cover by more than this fraction is dropped.
        stuff_area: panoptic: stuff segments of fewer pixels are void.
        confidence: semantic: keep the probability of the winning class at every pixel.
    """

    min_score: float = 0.05
    nms_iou: float | None = None
    top_k: int = 100
    mask_threshold: float = 0.5
    overlap: float = 0.5
    stuff_area: int = 4096
    confidence: bool = False


Output = Literal["logits", "probabilities", "labels", "detections", "panoptic", "own"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a loaded model except its weights.

    Attributes:
        name: the reference that the user gave.
        task: what it predicts.
        classes: its classes; output channel (or label) ``i`` is ``classes.classes[i]``. Empty when the checkpoint
            names none (label maps are then written as they come).
        input: see ``InputSpec``.
        output: what ``forward`` gives of each image. ``logits``: float (classes, h, w). ``probabilities``: likewise,
            not negative, in proportion to how likely each class is. ``labels``: integers (h, w), class indices.
            ``detections``: ``Detections``. ``panoptic``: ``PanopticParts``. ``own``: anything; see ``OwnOutput``.
        digest: hex digest of weights and of all that decides the output.
        licence, source: of the weights, where known.
        choice: of instance and panoptic models.
    """

    name: str
    task: Task
    classes: ClassTable
    input: InputSpec
    output: Output
    digest: str
    licence: str = ""
    source: str = ""
    choice: Choice = Choice()


@dataclass(frozen=True, slots=True)
class Detections:
    """Objects that a network found in one image, in any order.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels of the network's input, edges not centres.
        scores: (n,) float32, 0..1.
        classes: (n,) int64, index into ``spec.classes.classes``.
        masks: (n, m, m) float32: probabilities on a grid of m x m cells laid over the box.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    masks: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PanopticParts:
    """What a panoptic network says of one image before things and stuff are merged.

    Attributes:
        logits: (1 + stuff classes, h, w) float32 over the network's input: channel 0 is "some thing", the others are
            the classes that are not ``isthing``, in class order.
        detections: the things.
    """

    logits: NDArray[np.float32]
    detections: Detections


@dataclass(frozen=True, slots=True)
class Target:
    """The truth of one training crop of an instance or panoptic network.

    Attributes:
        classes: (h, w) int16 class indices, -1 for void: things and stuff; None where the task is instances.
        boxes: (n, 4) float32: left, top, right, bottom of the masks, edges: a mask of one pixel has a box of 1 x 1.
        labels: (n,) int64 class index.
        masks: (n, h, w) uint8, 0 or 1; never empty.
        iscrowd: (n,) bool: regions of many objects, which are neither to be found nor to be taken for background.
    """

    classes: NDArray[np.int16] | None
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8]
    iscrowd: NDArray[np.bool_]


class Geometry(NamedTuple):
    """How a photo lies in what the network is fed.

    Attributes:
        height, width: of the photo.
        fed_height, fed_width: of the photo inside the network's input, without the padding.
        padded_height, padded_width: of the network's input.
    """

    height: int
    width: int
    fed_height: int
    fed_width: int
    padded_height: int
    padded_width: int


class Segmenter(Protocol):
    """A loaded model. ``forward`` is called by several threads at once, each call computing with the threads that the
    model was loaded for: on a CPU one thread per photo beats all threads on one photo.
    """

    @property
    def spec(self) -> ModelSpec:
        """What it is and wants."""
        ...

    def forward(self, batch: NDArray[Any]) -> NDArray[Any] | Sequence[Any]:
        """Run the network.

        Args:
            batch: (n, h, w, channels) or (n, channels, h, w) as ``spec.input`` says, uint8 or float32, n >= 1.

        Returns:
            As ``spec.output`` says, one entry for each image (an array's first axis counts as such); h and w of maps
            may be smaller than the input's (a stride).
        """
        ...


class OwnInput(Protocol):
    """A model that prepares photos itself: ``spec.input.resize`` is ``own``."""

    def prepare(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[Any], tuple[int, int]]:
        """What the network is fed for an upright photo (height, width, 3).

        Returns:
            One image of ``forward``'s batch, and the (height, width) that the photo takes up in it, from the top left.
        """
        ...


class OwnOutput(Protocol):
    """A model that makes its predictions itself: ``spec.output`` is ``own``."""

    def finish(self, raw: Any, geometry: Geometry) -> Prediction:
        """The prediction on the upright photo's grid from one entry of ``forward``'s result.

        Raises:
            DataError: the result is unusable.
        """
        ...
