"""The Ray engine: long-lived actors that hold a worker each, and a driver that owns every decision.

Ray never retries anything here. The driver counts attempts, replaces dead actors, probes the samples that were in
flight at a death in a process of their own, and quarantines the one that kills or hangs. Only ShardRefs and Outcomes
travel.

``cluster.py`` is what the driver's side knows of Ray, ``actor.py`` and ``exported.py`` what runs on the nodes; no other
file of segbatch imports it.
"""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from segbatch.engine.ray_actors.session import RayEngine

__all__ = ["RayEngine"]
