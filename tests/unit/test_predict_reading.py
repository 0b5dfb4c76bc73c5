"""Photos are read ahead by all readers, whatever the size of the batches."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from segbatch.stages.inputs import Input
from segbatch.stages.predict import PHOTOS_AHEAD, READERS, read_ahead


@pytest.mark.parametrize("size", [1, 4, 6, 32, 64])
def test_all_readers_have_something_to_do(size: int) -> None:
    together = threading.Barrier(READERS)

    def read(photos: list[Input]) -> list[str]:
        together.wait(timeout=20)
        return [p.sample_id for p in photos]

    photos = [Input(str(i), None, f"s3://b/{i}", "") for i in range(size * 4 * READERS)]
    with ThreadPoolExecutor(READERS) as readers:
        chunks = [[i for part in parts for i in part] for parts in read_ahead(readers, read, photos, size)]
    assert [i for chunk in chunks for i in chunk] == [p.sample_id for p in photos]
    assert {len(chunk) for chunk in chunks} == {size}


def test_no_more_is_read_ahead_than_is_said() -> None:
    begun: list[str] = []

    def read(photos: list[Input]) -> int:
        begun.extend(p.sample_id for p in photos)
        return len(photos)

    photos = (Input(str(i), None, f"s3://b/{i}", "") for i in range(10_000))
    with ThreadPoolExecutor(READERS) as readers:
        stream = read_ahead(readers, read, photos, 8)
        assert next(stream) == [4, 4]
        stream.close()
    assert len(begun) <= PHOTOS_AHEAD + 3 * 8
