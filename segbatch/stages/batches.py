"""Batches of equal shapes out of a stream of photos of any shapes, and their results back in order.

What goes into a batch follows from the stream alone, never from who is done first: a rerun makes the same batches.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Numbered = tuple[int, T]
"""An element of a stream with its position."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many elements may wait for others like them.

    Attributes:
        batch: elements of a full batch.
        span: an element waits at most until so many later ones have come: bounds what must be put back in order, too.
        bytes: of all that wait; beyond it the longest waiting batch goes as it is.
    """

    batch: int
    span: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What is looked at in an element.

    Attributes:
        shape: elements of one shape go together; None for one that needs no company and goes at once.
        bytes: that it keeps in memory while it waits.
    """

    shape: Callable[[T], Hashable | None]
    bytes: Callable[[T], int]


def gathered(stream: Iterable[T], kind: Kind[T], room: Room) -> Iterator[list[Numbered[T]]]:
    """Batches of equal shape.

    Args:
        stream: any mixture of shapes.
        kind: what their shapes are.
        room: how many wait.

    Yields:
        1 to ``room.batch`` elements of one shape, in their order; a batch when it is full, or when its first element
        has waited long enough. Every element once.
    """
    waiting: dict[Hashable, list[Numbered[T]]] = {}  # a batch stands where its first element came
    held = 0
    for position, element in enumerate(stream):
        while waiting and (held > room.bytes or position - next(iter(waiting.values()))[0][0] >= room.span):
            oldest = waiting.pop(next(iter(waiting)))
            held -= sum(kind.bytes(e) for _, e in oldest)
            yield oldest
        shape = kind.shape(element)
        if shape is None:
            yield [(position, element)]
            continue
        batch = waiting.setdefault(shape, [])
        batch.append((position, element))
        held += kind.bytes(element)
        if len(batch) == room.batch:
            held -= sum(kind.bytes(e) for _, e in waiting.pop(shape))
            yield batch
    yield from waiting.values()


def in_order(batches: Iterable[Sequence[Numbered[T]]]) -> Iterator[T]:
    """The elements of batches in the order of their positions, which start at 0 and leave none out."""
    early: dict[int, T] = {}
    wanted = 0
    for batch in batches:
        early.update(batch)
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
