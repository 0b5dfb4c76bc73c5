"""Modules that stand for a torch module and compute the same in another way: autocast and torch.compile.

OpenVINO's is in ``openvino_graphs``. All take and give float32: what lies between the parts of a network (anchors,
suppression, RoIAlign) is torch's own, and is slow or coarse in bfloat16.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from segbatch.models.parts import Part

T = TypeVar("T")
Form = None | tuple[str, Any]
"""How tensors lie in a value: None for a tensor, else (``list``, ``tuple`` or ``dict``, forms of the members)."""


class Call(NamedTuple):
    """What a module was given: positional and named arguments, which hold nothing but tensors."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]


def flattened(value: Any) -> tuple[list[Tensor], Form]:
    """The tensors of a value in order, and how they lie in it.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, Tensor):
        return [value], None
    if isinstance(value, Mapping):
        found = {str(k): flattened(v) for k, v in value.items()}
        return [t for tensors, _ in found.values() for t in tensors], ("dict", {k: f for k, (_, f) in found.items()})
    if isinstance(value, list | tuple):
        members = [flattened(v) for v in value]
        kind = "list" if isinstance(value, list) else "tuple"
        return [t for tensors, _ in members for t in tensors], (kind, [f for _, f in members])
    raise TypeError(f"{type(value).__name__} is no tensor")


def rebuilt(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value of which ``flattened`` gave tensors and form; the form may have been through JSON."""
    if form is None:
        return next(tensors)
    kind, members = form
    if kind == "dict":
        return {k: rebuilt(f, tensors) for k, f in members.items()}
    found = [rebuilt(f, tensors) for f in members]
    return found if kind == "list" else tuple(found)


class Flat(nn.Module):
    """A module with tensors as its only arguments and results.

    Args:
        module: the module.
        form: of its arguments, as (positional, named).
    """

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.module = module
        self._form = form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's tensors in order."""
        args, named = rebuilt(self._form, iter(tensors))
        return tuple(flattened(self.module(*args, **named))[0])


class Autocast(nn.Module):
    """A module under torch's autocast: convolutions and matrix products in ``dtype``, sensitive operations in float32.

    Args:
        module: the module.
        dtype: number format.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        super().__init__()
        self.module = module
        self._dtype, self._device = dtype, device

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the module gives, in float32."""
        with torch.autocast(self._device, self._dtype):
            tensors, form = flattened(self.module(*args, **named))
        return rebuilt(form, iter([t.float() if t.is_floating_point() else t for t in tensors]))


class Compiled(nn.Module):
    """A module compiled by torch.compile, weights frozen into the code; one compilation for each shape, 10 to 40 s.

    Needs a C++ compiler. Shapes beyond the first few are compiled for any size.

    Args:
        module: the module.
        dtype: ``bfloat16`` compiles it as under autocast.
    """

    def __init__(self, module: nn.Module, dtype: str) -> None:
        super().__init__()
        inner = Autocast(module) if dtype == "bfloat16" else module
        self._run: Callable[..., Any] = torch.compile(inner, options={"freezing": True})

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the module gives."""
        return self._run(*args, **named)


@contextlib.contextmanager
def listening(parts: Sequence[Part], take: Callable[[Call], T]) -> Iterator[dict[str, list[T]]]:
    """While this context lasts, something of what every part is given is kept, by key.

    Args:
        parts: in torch's hands.
        take: what of it.

    Yields:
        What was taken of each call, filled in as they come.
    """
    calls: dict[str, list[T]] = {}
    hooks = []

    def note(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.setdefault(key, []).append(take(Call(args, dict(named))))

        return hook

    for part in parts:
        hooks.append(part.module.register_forward_pre_hook(note(part.key), with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def shapes_of(call: Call) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of a call's tensors in order; None where it was given something else as well."""
    try:
        return tuple(tuple(t.shape) for t in flattened((call.args, dict(call.named)))[0])
    except TypeError:
        return None
