"""What Ray's errors say."""

from ray.exceptions import RaySystemError, RayTaskError

from segbatch.engine.base import as_ours
from segbatch.errors import ConfigError, SegbatchError


def cause(error: RayTaskError) -> SegbatchError:
    """What a worker raised."""
    if isinstance(error.cause, RaySystemError) and "No module named" in str(error.cause):
        return ConfigError(
            f"the workers cannot use this model: {last_line(error.cause)}",
            "install its package on every node, or use --engine inline",
        )
    return as_ours(error.cause)


def last_line(error: BaseException) -> str:
    """The line of a long message that says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Some common causes")[0] if lines else type(error).__name__
