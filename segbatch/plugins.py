"""Named parts that are imported when they are asked for: built-in ones, and those of other people's packages."""

import functools
import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from segbatch.config import nearest
from segbatch.errors import ConfigError

T = TypeVar("T")


class Plugins(Generic[T]):
    """Parts of one kind by name."""

    def __init__(self, kind: str, package: str, built_in: Mapping[str, str], group: str) -> None:
        """Remember where the parts lie; nothing is imported.

        Args:
            kind: what a part is called in messages.
            package: of the built-in parts.
            built_in: ``module:Class`` below that package, by name.
            group: of entry points; a built-in name cannot be taken.
        """
        self._kind, self._package, self._built_in, self.group = kind, package, built_in, group

    def names(self) -> tuple[str, ...]:
        """Built-in and installed parts, in alphabetical order."""
        return tuple(sorted({*self._built_in, *self._installed()}))

    def get(self, name: str, also: Sequence[str] = ()) -> T:
        """The part of that name.

        Args:
            name: of the part.
            also: other names that would have been good, for the message.

        Raises:
            ConfigError: an unknown name, with the known ones and the nearest; a part that cannot be imported.
        """
        if name in self._built_in:
            return self._load(name)
        installed = self._installed()
        if name not in installed:
            known = [*self.names(), *also]
            raise ConfigError(f"unknown {self._kind} {name!r}{nearest(name, known)}", f"known: {', '.join(known)}")
        try:
            found: T = _made(installed[name].load())
            return found
        except (ImportError, AttributeError) as error:
            where = installed[name].value
            raise ConfigError(f"{self._kind} {name!r} ({where}) cannot be loaded: {error}", "reinstall it") from error

    @functools.cache  # noqa: B019  # registries live as long as the process
    def _load(self, name: str) -> T:
        module, _, part = self._built_in[name].partition(":")
        found: T = _made(getattr(importlib.import_module(f"{self._package}.{module}"), part))
        return found

    def _installed(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.group) if e.name not in self._built_in}


def _made(part: Any) -> Any:
    """A class is called without arguments; anything else is the part itself."""
    return part() if isinstance(part, type) else part
