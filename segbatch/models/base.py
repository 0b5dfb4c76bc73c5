"""What every model is to the rest of segbatch: a ``ModelSpec`` and a ``forward``.

Pre-processing (``segbatch.inference``) follows from ``spec.input``, post-processing from ``spec.output``;
so the engine, the evaluator and the apps know nothing of architectures.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from segbatch.records import ClassTable, Task


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the network wants to be fed.

    Attributes:
        height, width: fixed input size, or None when the network takes any size.
        resize: ``stretch`` to (height, width); ``none`` feeds the photo at its own size.
        divisor: sides are padded (bottom, right, with the mean colour) to a multiple of this; the output is cropped.
        layout: ``nhwc`` or ``nchw``.
        dtype: ``uint8`` feeds raw RGB; ``float32`` feeds ``(rgb / 255 - mean) / std``.
        mean, std: per RGB channel, in units of 0..1.
    """

    height: int | None = None
    width: int | None = None
    resize: Literal["stretch", "none"] = "none"
    divisor: int = 1
    layout: Literal["nhwc", "nchw"] = "nchw"
    dtype: Literal["uint8", "float32"] = "float32"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a loaded model except its weights.

    Attributes:
        name: the reference that the user gave.
        task: what it predicts.
        classes: its classes; output channel (or label) ``i`` is ``classes.classes[i]``. Empty when the checkpoint
            names none (label maps are then written as they come).
        input: see ``InputSpec``.
        output: ``logits``: float (n, classes, h, w); ``labels``: integers (n, h, w), class indices.
        digest: hex digest of weights and of all that decides the output.
        licence, source: of the weights, where known.
    """

    name: str
    task: Task
    classes: ClassTable
    input: InputSpec
    output: Literal["logits", "labels"]
    digest: str
    licence: str = ""
    source: str = ""


class Segmenter(Protocol):
    """A loaded model. ``forward`` is called by several threads at once, each call computing with the threads that the
    model was loaded for: on a CPU one thread per photo beats all threads on one photo.
    """

    @property
    def spec(self) -> ModelSpec:
        """What it is and wants."""
        ...

    def forward(self, batch: NDArray[Any]) -> NDArray[Any]:
        """Run the network.

        Args:
            batch: (n, h, w, 3) or (n, 3, h, w) as ``spec.input`` says, uint8 or float32, n >= 1.

        Returns:
            As ``spec.output`` says; h and w may be smaller than the input's (a stride).
        """
        ...
