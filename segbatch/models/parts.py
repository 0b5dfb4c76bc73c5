"""Where, inside a ``Segmenter``, something faster may take torch's place. torch is not imported here.

A ``ModelSource`` with an attribute ``has_parts`` that is true says that what it loads may have some.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A network inside a ``Segmenter``, or a piece of one: tensors in, tensors out, the same work for every photo.

    Another module that computes the same may take its place.

    Attributes:
        key: digest of the model, and which part of it: equal keys compute the same.
        holder: what it hangs on.
        attribute: by which name.
        convertible: every call is given the same number of tensors, so that its graph can be taken down once.
    """

    key: str
    holder: Any
    attribute: str
    convertible: bool = True

    @property
    def module(self) -> "nn.Module":
        """What computes it now."""
        return cast("nn.Module", getattr(self.holder, self.attribute))

    def replace(self, module: "nn.Module") -> None:
        """Let another module compute it, from numbers in float32 to numbers in float32."""
        setattr(self.holder, self.attribute, module)


@runtime_checkable
class HasParts(Protocol):
    """A ``Segmenter`` whose work is torch's."""

    def parts(self) -> Sequence[Part]:
        """The networks, or their pieces, that do nearly all of its work."""
        ...


def parts_of(segmenter: object) -> Sequence[Part]:
    """The parts of a ``Segmenter``; none where something else than torch runs it."""
    return segmenter.parts() if isinstance(segmenter, HasParts) else ()
