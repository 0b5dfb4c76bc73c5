"""What the Ray engine asks of a GPU when the driver's machine has none: ``gpu_elsewhere.py``, prints JSON.

A process of its own, because a test session has a Ray of its own. The nodes are raylets on this machine, and the GPU is
Ray's word for it: nothing computes there.
"""

import json
import os
from typing import NoReturn

import ray
from ray.cluster_utils import Cluster

from segbatch.config import EngineConfig
from segbatch.engine import make
from segbatch.errors import ConfigError, EngineError


def place() -> tuple[str, str, int]:
    """Where this runs: node, its GPUs, process."""
    return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid()


def refused() -> NoReturn:
    raise ConfigError("no format agrees", "lower --min-agreement")


def dies() -> NoReturn:
    os._exit(1)


def complaint(ask: object) -> str:
    """What the engine says of something that fails there."""
    try:
        engine.on_gpu(ask)  # type: ignore[arg-type]
    except (ConfigError, EngineError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


options = {"num_cpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=options)
ray.init(address=cluster.address, log_to_driver=False)
engine = make(EngineConfig(kind="ray"))
engine.start()
before = engine.has_gpus()
there = cluster.add_node(num_gpus=1, **options).node_id
cluster.wait_for_nodes()
found = {
    "before": before,
    "has_gpus": engine.has_gpus(),
    "there": there,
    "here": os.getpid(),
    "places": [engine.on_gpu(place), engine.on_gpu(place)],
    "refused": complaint(refused),
    "dies": complaint(dies),
}
engine.close()
ray.shutdown()
cluster.shutdown()
print(json.dumps(found))
