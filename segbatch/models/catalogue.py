"""What ``segbatch models`` tells of the built-in networks: size and speed of each in the form that its paper gives.

``catalogue.json`` is made by ``tests/bench/bench_models.py``, which builds every network and times it.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """A built-in network in one of its forms.

    Attributes:
        architecture: its name in ``name@checkpoint``.
        options: what its configuration says beside the defaults.
        classes: for which it was measured.
        parameters: all of them, fixed ones too.
        height, width: of the photo that it was timed with, in pixels.
        images_per_s: with one thread in float32, pre- and post-processing included.
    """

    architecture: str
    options: dict[str, Any]
    classes: int
    parameters: int
    height: int
    width: int
    images_per_s: float

    @property
    def form(self) -> str:
        """The options as ``key=value``."""
        return " ".join(f"{k}={v}" for k, v in self.options.items())


@functools.cache
def machine() -> str:
    """What the times were measured on."""
    return str(_content()["machine"])


@functools.cache
def cards() -> tuple[Card, ...]:
    """Every form of every built-in network."""
    return tuple(Card(**entry) for entry in _content()["cards"])


def _content() -> dict[str, Any]:
    text = resources.files("segbatch.models").joinpath("catalogue.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
