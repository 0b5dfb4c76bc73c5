"""Compiled loops of ``runlength``; imported on first use, because importing numba takes longer than most calls.

All arrays are one-dimensional and contiguous; ``kernel`` compiles a function for one pixel type when it is first asked
for. What makes encoding fast: 64 pixels are compared with their right-hand neighbours in one vector operation, and the
64 answers become one machine word. A word of zeros is 64 pixels without a boundary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from segbatch.codecs._jit import Kernels, part

BLOCK = 64
"""Pixels compared at once: the bits of one word."""

STORE_BYTES = 64
"""Bytes that decoding writes at once; runs up to this long take a single store."""


def _intrinsic(function: Callable[..., Any]) -> Any:
    return intrinsic(function)  # called without the typing context, which a type checker cannot know


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@_intrinsic
def boundaries(typing_context: Any, flat: Any, start: Any) -> Any:
    """``boundaries(flat, start)``: word whose bit ``i`` says ``flat[start + i] != flat[start + i + 1]``, i < 64.

    Reads ``flat[start : start + 65]``, unchecked.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        here = _element_pointer(context, builder, array_type, *arguments)
        item = here.type.pointee
        next_one = builder.gep(here, [ir.Constant(ir.IntType(64), 1)])
        vector = ir.VectorType(item, BLOCK).as_pointer()
        width = context.get_abi_sizeof(item)
        left = builder.load(builder.bitcast(here, vector), align=width)
        right = builder.load(builder.bitcast(next_one, vector), align=width)
        return builder.bitcast(builder.icmp_unsigned("!=", left, right), ir.IntType(64))

    return types.uint64(flat, types.int64), generate


@_intrinsic
def splat(typing_context: Any, flat: Any, start: Any, value: Any) -> Any:
    """``splat(flat, start, value)``: write ``value`` to the 64 bytes from ``flat[start]`` on, unchecked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, value = arguments
        here = _element_pointer(context, builder, signature.args[0], array, start)
        item = here.type.pointee
        width = context.get_abi_sizeof(item)
        lanes = ir.VectorType(item, STORE_BYTES // width)
        one = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), STORE_BYTES // width), None)
        every = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)
        builder.store(every, builder.bitcast(here, lanes.as_pointer()), align=width)
        return context.get_dummy_value()

    return types.void(flat, types.int64, flat.dtype), generate


@_intrinsic
def lowest_bit(typing_context: Any, word: Any) -> Any:
    """Index of the lowest set bit of a non-zero word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


@_intrinsic
def bits_set(typing_context: Any, word: Any) -> Any:
    """Number of set bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def count_runs(flat: NDArray[Any]) -> int:
    """Number of runs of equal items; 0 for an empty array."""
    last = flat.size - 1
    if last < 0:
        return 0
    runs = 1
    blocks = last // BLOCK * BLOCK
    for start in range(0, blocks, BLOCK):
        runs += bits_set(boundaries(flat, start))
    for i in range(blocks, last):
        runs += flat[i] != flat[i + 1]
    return runs


def fill_runs(flat: NDArray[Any], values: NDArray[Any], lengths: NDArray[np.uint32]) -> None:
    """Write the runs of ``flat`` (at least one item, fewer than 2**32); both outputs are ``count_runs`` long."""
    last = flat.size - 1
    run = 0
    begin = 0
    blocks = last // BLOCK * BLOCK
    for start in range(0, blocks, BLOCK):
        word: Any = boundaries(flat, start)
        while word != np.uint64(0):
            i = start + lowest_bit(word)
            word &= word - np.uint64(1)
            values[run] = flat[i]
            lengths[run] = i + 1 - begin
            begin = i + 1
            run += 1
    for i in range(blocks, last):
        if flat[i] != flat[i + 1]:
            values[run] = flat[i]
            lengths[run] = i + 1 - begin
            begin = i + 1
            run += 1
    values[run] = flat[last]
    lengths[run] = last + 1 - begin


def span(values: NDArray[np.uint16], lengths: NDArray[np.uint32]) -> Any:
    """Pixels that the runs cover, and their greatest value (0 when there are none), both uint64."""
    pixels = np.uint64(0)
    greatest = np.uint16(0)
    for i in range(lengths.size):
        pixels += np.uint64(lengths[i])
    for i in range(values.size):
        greatest = max(greatest, values[i])
    return pixels, np.uint64(greatest)


def fill_pixels(values: NDArray[np.uint16], lengths: NDArray[np.uint32], flat: NDArray[Any]) -> None:
    """Write the runs' pixels; the caller has checked that they cover ``flat`` exactly."""
    wide = STORE_BYTES // flat.itemsize
    safe = flat.size - wide  # last position where a whole vector fits
    zero = flat.dtype.type(0)
    end: Any = 0
    for run in range(lengths.size):
        value = zero + flat.dtype.type(values[run])
        begin = end
        end += np.int64(lengths[run])
        if end <= safe:
            splat(flat, begin, value)  # spills over into the next run, which comes after
            for i in range(begin + wide, end, wide):
                splat(flat, i, value)
        else:
            for i in range(begin, end):
                flat[i] = value


def add_pixels(values: NDArray[np.uint16], lengths: NDArray[np.uint32], pixels: NDArray[np.uint64]) -> None:
    """``pixels[value] += length`` for every run."""
    for run in range(lengths.size):
        pixels[values[run]] += np.uint64(lengths[run])


@part
def _next_run(lengths: NDArray[np.uint32], run: Any, run_end: Any, position: Any) -> tuple[Any, Any]:
    """The run (and its end) that is current from ``position`` on; without a branch, which would be a coin toss."""
    step = np.int64(run_end == position)
    run += step
    return run, run_end + step * np.int64(lengths[run])


def add_joint(
    values_a: NDArray[np.uint16],
    lengths_a: NDArray[np.uint32],
    values_b: NDArray[np.uint16],
    lengths_b: NDArray[np.uint32],
    pixels: int,
    table: NDArray[np.uint64],
    columns: int,
) -> None:
    """``table[a * columns + b] += overlap``; both lists of runs cover ``pixels`` pixels, more than none."""
    i = j = 0
    position: Any = 0
    end_a = np.int64(lengths_a[0])
    end_b = np.int64(lengths_b[0])
    while True:
        end = min(end_a, end_b)
        table[np.int64(values_a[i]) * columns + np.int64(values_b[j])] += np.uint64(end - position)
        position = end
        if position == pixels:
            return
        i, end_a = _next_run(lengths_a, i, end_a, position)
        j, end_b = _next_run(lengths_b, j, end_b, position)


def list_joint(
    values_a: NDArray[np.uint16],
    lengths_a: NDArray[np.uint32],
    values_b: NDArray[np.uint16],
    lengths_b: NDArray[np.uint32],
    pixels: int,
    keys: NDArray[np.uint32],
    overlaps: NDArray[np.uint64],
) -> int:
    """Like ``add_joint`` for ids too many for a table: writes ``a << 16 | b`` and overlap of every step.

    Both outputs need room for as many steps as there are runs; returns how many were written.
    """
    i = j = steps = 0
    position: Any = 0
    end_a = np.int64(lengths_a[0])
    end_b = np.int64(lengths_b[0])
    while True:
        end = min(end_a, end_b)
        keys[steps] = np.uint32(values_a[i]) << np.uint32(16) | np.uint32(values_b[j])
        overlaps[steps] = end - position
        steps += 1
        position = end
        if position == pixels:
            return steps
        i, end_a = _next_run(lengths_a, i, end_a, position)
        j, end_b = _next_run(lengths_b, j, end_b, position)


_ID, _LENGTH, _COUNT = types.uint16, types.uint32, types.uint64


def _read(item: Any) -> Any:
    return types.Array(item, 1, "C", readonly=True)  # takes writable arrays too; Arrow's are read-only


def _write(item: Any) -> Any:
    return types.Array(item, 1, "C")


_RUNS = (_read(_ID), _read(_LENGTH))
_PAIR: Any = types.UniTuple(_COUNT, 2)  # type: ignore[no-untyped-call]


def _signature(function: Callable[..., Any], pixel: Any) -> Any:
    signatures: dict[Callable[..., Any], Any] = {
        count_runs: types.int64(_read(pixel)),
        fill_runs: types.void(_read(pixel), _write(_ID), _write(_LENGTH)),
        span: _PAIR(*_RUNS),
        fill_pixels: types.void(*_RUNS, _write(pixel)),
        add_pixels: types.void(*_RUNS, _write(_COUNT)),
        add_joint: types.void(*_RUNS, *_RUNS, types.int64, _write(_COUNT), types.int64),
        list_joint: types.int64(*_RUNS, *_RUNS, types.int64, _write(types.uint32), _write(_COUNT)),
    }
    return signatures[function]


KERNELS = Kernels(_signature)
kernel = KERNELS.kernel
