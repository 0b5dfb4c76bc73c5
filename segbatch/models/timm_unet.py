"""Encoders of timm under a decoder of smp's: ``timm:ENCODER@FILE``.

FILE is a state dict, by ``torch.save`` or safetensors, of ``smp.create_model("unet", "tu-ENCODER")``, encoder and
decoder together; of another architecture of smp's as ``timm:ARCHITECTURE/ENCODER@FILE``. ENCODER is timm's name of it,
with or without the tag of its first weights, which decides mean and deviation. ``smp`` has the rest: this is
``smp:ARCHITECTURE/tu-ENCODER@FILE``.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from segbatch.errors import ConfigError
from segbatch.models import smp
from segbatch.models.base import ModelSpec, Segmenter

_REFERENCE = re.compile(r"(?:(?P<architecture>\w+)/)?(?P<encoder>[\w.+-]+)@(?P<uri>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TimmSource:
    """An encoder, perhaps an architecture, a file and, optionally, a class list."""

    what: str
    classes_uri: str = ""
    has_parts: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """``timm:`` and what the user gave."""
        return f"timm:{self.what}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``; the weights must fit."""
        return smp.described(self._blueprint())

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        return smp.loaded(self._blueprint(), threads)

    def _blueprint(self) -> smp.Blueprint:
        match = _REFERENCE.fullmatch(self.what)
        if match is None:
            raise ConfigError(
                f"model {self.reference} names no encoder and file",
                "give timm:ENCODER@FILE or timm:ARCHITECTURE/ENCODER@FILE, FILE being a network's state dict",
            )
        encoder = "tu-" + match["encoder"].removeprefix("tu-")
        return smp.of_file(self.reference, match["architecture"] or "unet", encoder, match["uri"], self.classes_uri)
