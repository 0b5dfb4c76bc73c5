"""Batches of equal shapes: full where that is possible, the same every time, in bounded memory, rows in order."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import doubles
import generators
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segbatch import api, tables
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.jobs import Limits
from segbatch.stages.batches import Kind, Numbered, Room, gathered, in_order

LETTERS: Kind[str] = Kind(lambda letter: None if letter == "-" else letter, lambda letter: 1)
SIZES: Kind[tuple[int, int]] = Kind(lambda size: size, lambda size: size[0] * size[1])
COCO_SIZES = ((480, 640),) * 9 + ((640, 480),) * 4 + ((427, 640),) * 4 + ((640, 427),) * 2 + ((375, 500), (333, 500))
"""About how often sizes come up among COCO's photos."""


def batches_of(stream: str, batch: int, span: int = 99, bytes_: int = 99) -> list[str]:
    return ["".join(letter for _, letter in found) for found in gathered(stream, LETTERS, Room(batch, span, bytes_))]


def test_a_full_batch_goes_at_once_and_what_is_left_at_the_end() -> None:
    assert batches_of("abacbbc", 2) == ["aa", "bb", "cc", "b"]
    assert batches_of("ab-a", 2) == ["-", "aa", "b"]


def test_nothing_waits_for_too_many_others() -> None:
    assert batches_of("abbbbbbbb", 4, span=4) == ["a", "bbbb", "bbbb"]
    assert batches_of("abcdefg", 4, bytes_=2) == ["a", "b", "c", "d", "e", "f", "g"]


@settings(max_examples=150, deadline=None)
@given(st.text("aabbcd-", max_size=60), st.integers(1, 5), st.integers(1, 20), st.integers(0, 20))
def test_every_element_once_with_its_like_and_none_waits_long(stream: str, batch: int, span: int, room: int) -> None:
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for letter in stream:
            read += 1
            yield letter

    out: list[Numbered[str]] = []
    for found in gathered(counted(), LETTERS, Room(batch, span, room)):
        positions = [position for position, _ in found]
        assert 1 <= len(found) <= batch
        assert len({letter for _, letter in found}) == 1 and positions == sorted(positions)
        assert read - 1 - positions[0] <= span or read == len(stream)
        assert read - len(out) <= room + 2 or read == len(stream)
        out += found
    assert sorted(out) == list(enumerate(stream))
    assert "".join(in_order([[pair] for pair in out])) == stream


def test_mixed_sizes_fill_batches_and_add_no_padding() -> None:
    """Against consecutive photos: split by shape they leave batches empty, padded to the largest they waste pixels."""
    dice = random.Random(0)
    stream = [dice.choice(COCO_SIZES) for _ in range(2000)]
    size = 8
    found = list(gathered(stream, SIZES, Room(size, 32 * size, 10**9)))
    assert found == list(gathered(stream, SIZES, Room(size, 32 * size, 10**9)))
    assert all(len({photo for _, photo in batch}) == 1 for batch in found)  # so the wasted padding is nil
    fill = len(stream) / (size * len(found))
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    split = len(stream) / (size * sum(len(set(chunk)) for chunk in chunks))
    needed = sum(h * w for h, w in stream)
    padded = sum(len(chunk) * max(h for h, _ in chunk) * max(w for _, w in chunk) for chunk in chunks)
    assert fill > 0.9
    assert split < 0.35 and 1 - needed / padded > 0.2


@dataclass(frozen=True)
class Shapes(doubles.FreeModel):
    """Remembers the shapes that it was given, in ``seen``."""

    def act(self, batch: NDArray[np.uint8]) -> None:
        with doubles.ONE_AT_A_TIME:
            SEEN.append(batch.shape)


SEEN: list[tuple[int, ...]] = []
SHAPES = ((8, 12), (12, 8), (8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 photos of three shapes in no order, and two that are broken."""
    made = tmp_path_factory.mktemp("photos")
    dice = random.Random(1)
    for number in range(60):
        generators.save(made / f"{number:02d}.png", generators.photo(number, dice.choice(SHAPES)))
    for number in (7, 31):
        (made / f"{number:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9))
    return made


def predict(folder: Path, out: Path, batch_size: int, threads: int = 2) -> list[dict[str, Any]]:
    """Rows of the masks table, in its order."""
    SEEN.clear()
    options = RunOptions(engine=EngineConfig(kind="inline", threads=threads), plan=PlanConfig(shard_rows=100))
    api.predict(Shapes(), str(folder), str(out), batch_size=batch_size, options=options, limits=Limits(1.0))
    columns = ["sample_id", "status", "height", "width", "semantic"]
    return [row for b in tables.scan(str(out), "masks", columns) for row in b.to_pylist()]


def test_a_run_makes_full_batches_and_keeps_its_rows(folder: Path, tmp_path: Path) -> None:
    wanted = predict(folder, tmp_path / "one", 1)
    assert len(SEEN) == 58 and {s[0] for s in SEEN} == {1}
    assert [r["sample_id"] for r in wanted] == sorted(r["sample_id"] for r in wanted)
    assert [r["status"] != "ok" for r in wanted] == [n in (7, 31) for n in range(60)]
    compositions = []
    for name, threads in (("four", 1), ("four again", 3)):
        assert predict(folder, tmp_path / name, 4, threads) == wanted
        compositions.append(sorted(SEEN))
    assert compositions[0] == compositions[1]
    assert sum(s[0] for s in SEEN) == 58
    assert sum(s[0] < 4 for s in SEEN) <= len(SHAPES)  # what is left of each shape at the end
