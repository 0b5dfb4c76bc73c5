"""Reading, listing and writing S3, against bare loops of s3fs with the same concurrency, on a local test server.

The bare loops run in the event loop themselves: ``_cat_file`` without its HEAD, ``_lsdir`` in one call, ``_pipe_file``.
Both sides take turns, with a connection pool of the same size; the figure is the ratio of medians. The test server
does most of the work here, so CPU seconds of this process are shown as well. ``footers`` has no bare loop of its own:
it opens 200 Parquet files as readers of tables do, against s3fs's files.

    python tests/bench/bench_storage.py [--objects 2000] [--keys 20000] [--parts 4] [--at-a-time 32] [--rounds 3]
                                        [--only read write footers list]
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import s3

from segbatch import storage

PROJECT = Path(__file__).resolve().parent.parent.parent
Work = Callable[[], int]


def bare(at_a_time: int) -> Any:
    """s3fs with its documented options and a pool as large as segbatch's."""
    import s3fs

    config = {"max_pool_connections": 64, "retries": {"total_max_attempts": 1}}
    return s3fs.S3FileSystem(
        config_kwargs=config, max_concurrency=1, use_listings_cache=False, skip_instance_cache=True
    )


def gathered(filesystem: Any, calls: Iterable[Callable[[], Coroutine[Any, Any, Any]]], at_a_time: int) -> list[Any]:
    """Results of coroutines, so many at a time."""

    async def run() -> list[Any]:
        slots = asyncio.Semaphore(at_a_time)

        async def one(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
            async with slots:
                return await call()

        return list(await asyncio.gather(*(one(call) for call in calls)))

    return asyncio.run_coroutine_threadsafe(run(), filesystem.loop).result()


def compare(name: str, rounds: int, unit: str, amount: float, pair: tuple[Work, Work]) -> float:
    """Both sides in turns; prints a line, returns ours as a share of the bare rate."""
    seconds: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    results = set()
    for turn in range(rounds):
        for side in ((0, 1), (1, 0))[turn % 2]:
            began, used = time.perf_counter(), time.process_time()
            results.add(pair[side]())
            seconds[side].append(time.perf_counter() - began)
            cpu[side].append(time.process_time() - used)
    assert len(results) == 1, f"the two sides of {name} differ: {results}"
    ours, theirs = (amount / statistics.median(s) for s in seconds)
    cpu_s = " / ".join(f"{statistics.median(c):.2f}" for c in cpu)
    print(
        f"{name:10} segbatch {ours:9.1f} {unit:6} s3fs {theirs:9.1f} {unit:6} {ours / theirs:5.2f}   CPU s {cpu_s}",
        flush=True,
    )
    return ours / theirs


def reading(root: str, count: int, at_a_time: int) -> tuple[Work, Work]:
    """Objects of 100 kB."""
    uris = [f"{root}/{i:05d}" for i in range(count)]
    data = os.urandom(100_000)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda uri: storage.replace(uri, data), uris))
    filesystem = bare(at_a_time)
    calls = [lambda u=uri: filesystem._cat_file(u) for uri in uris]
    return (
        lambda: sum(len(d) for d in storage.read_ahead(uris, at_a_time)),
        lambda: sum(len(d) for d in gathered(filesystem, calls, at_a_time)),
    )


def listing(root: str, count: int) -> tuple[Work, Work]:
    """Empty objects in one folder."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.replace(f"{root}/part-{i:08d}.parquet", b""), range(count)))
    filesystem = bare(1)
    path = root.removeprefix("s3://")
    return (
        lambda: sum(1 for _ in storage.list_files(root)),
        lambda: len(gathered(filesystem, [lambda: filesystem._lsdir(path, refresh=True)], 1)[0]),
    )


def writing(root: str, count: int, size: int, at_a_time: int) -> tuple[Work, Work]:
    """Objects of ``size`` bytes, put if absent."""
    data = os.urandom(1 << 20) * (size >> 20)
    filesystem, turn = bare(at_a_time), iter(range(1_000_000))

    def ours() -> int:
        uris = [f"{root}/ours-{next(turn)}" for _ in range(count)]
        with ThreadPoolExecutor(at_a_time) as pool:
            list(pool.map(lambda uri: storage.create(uri, data), uris))
        return discard(uris)

    def theirs() -> int:
        uris = [f"{root}/bare-{next(turn)}" for _ in range(count)]
        gathered(filesystem, [lambda u=uri: filesystem._pipe_file(u, data, mode="create") for uri in uris], at_a_time)
        return discard(uris)

    return ours, theirs


def discard(uris: list[str]) -> int:
    """The test server keeps everything in memory."""
    for uri in uris:
        storage.delete(uri)
    return len(uris)


def footers(root: str, count: int) -> tuple[Work, Work]:
    """Parquet files of which only the footer is read."""
    table, out = pa.table({"x": range(20_000), "y": [os.urandom(20) for _ in range(20_000)]}), pa.BufferOutputStream()
    pq.write_table(table, out)
    uris = [f"{root}/{i}" for i in range(count)]
    for uri in uris:
        storage.replace(uri, out.getvalue().to_pybytes())
    filesystem = bare(16)

    def rows(opened: Callable[[str], Any]) -> Work:
        def one(uri: str) -> int:
            with opened(uri) as file:
                return int(pq.read_metadata(file).num_rows)

        def work() -> int:
            with ThreadPoolExecutor(16) as pool:
                return sum(pool.map(one, uris))

        return work

    return rows(storage.open_input), rows(lambda uri: filesystem.open(uri, "rb"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--at-a-time", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=["read", "write", "footers", "list"])
    o = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        s3.server(PROJECT / ".venv-s3" / "bin" / "moto_server", Path(folder) / "server.log") as server,
    ):
        os.environ.update(server.environment)
        root = server.root("bench")
        benches: dict[str, Callable[[], float]] = {
            "read": lambda: compare(
                "read", o.rounds, "MB/s", o.objects * 0.1, reading(f"{root}/read", o.objects, o.at_a_time)
            ),
            "write": lambda: compare(
                "write", o.rounds, "MB/s", o.parts * 64 * 1.048576, writing(f"{root}/write", o.parts, 64 << 20, 2)
            ),
            "footers": lambda: compare("footers", o.rounds, "/s", 200, footers(f"{root}/footers", 200)),
            "list": lambda: compare("list", o.rounds, "keys/s", o.keys, listing(f"{root}/list", o.keys)),
        }
        for name in o.only or benches:
            benches[name]()


if __name__ == "__main__":
    main()
