"""The Ray engine: long-lived actors that hold a worker each, and a driver that owns every decision.

Ray never retries anything here. The driver counts attempts, replaces dead actors, probes the samples that were in
flight at a death in a process of their own, and quarantines the one that kills or hangs. Only ShardRefs and Outcomes
travel.
"""

from segbatch.engine.ray_actors.session import RayEngine

__all__ = ["RayEngine"]
