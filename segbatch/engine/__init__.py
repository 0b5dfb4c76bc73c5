"""Engines: ``inline`` in this process, ``ray`` on actors. One small interface, see ``engine.base``."""

from segbatch.config import EngineConfig
from segbatch.engine.base import Control, Engine

__all__ = ["Control", "Engine", "make"]


def make(config: EngineConfig) -> Engine:
    """The engine that ``config.kind`` names; Ray is imported only when it is used."""
    if config.kind == "inline":
        from segbatch.engine.inline import InlineEngine

        return InlineEngine(config)
    from segbatch.engine.ray_actors import RayEngine

    return RayEngine(config)
