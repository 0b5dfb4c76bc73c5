"""OpenTelemetry spans: one of each verb, and below it one of each worker's start and of each shard, in any process.

They are made where ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) says where to and the extra ``otel`` is
installed, or where the program around segbatch has set up tracing itself. OpenTelemetry's other variables
(``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_SERVICE_NAME``, ``OTEL_SDK_DISABLED``, ...) hold as everywhere; on a cluster
they must be set on every node. Everywhere else nothing is imported and nothing is done.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float | bool]
Note = Callable[[Attributes], None]
"""Says more of a span."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_DELAY_MS = 1000
_FLUSH_MS = 2000


@contextlib.contextmanager
def span(name: str, parent: Mapping[str, str] | None = None, attributes: Attributes | None = None) -> Iterator[Note]:
    """A span around what is done within; an exception ends it as failed.

    Args:
        name: of the span.
        parent: ``here()`` of another process or thread; None: the span that is open in this thread.
        attributes: what is known at its start; ``segbatch.`` comes before their names.
    """
    provider = _provider()
    if provider is None:
        yield _nobody
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(parent) if parent else None
    tracer = provider.get_tracer("segbatch")
    with tracer.start_as_current_span(name, context=context, attributes=_named(attributes or {})) as opened:
        yield lambda more: opened.set_attributes(_named(more))


def here() -> dict[str, str]:
    """The open span, for ``span`` in another process or thread; empty where there is none."""
    carrier: dict[str, str] = {}
    if _provider() is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    return carrier


def flush() -> None:
    """Send what has ended: the process may be about to end."""
    provider = _provider()
    if provider is not None and hasattr(provider, "force_flush"):
        provider.force_flush(_FLUSH_MS)


def _nobody(more: Attributes) -> None:
    """Nobody listens."""


def _named(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {f"segbatch.{name}": value for name, value in attributes.items()}


def _provider() -> Any:
    """Who makes spans; None where nobody is to."""
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        if type(found := trace.get_tracer_provider()).__module__.startswith("opentelemetry.sdk"):
            return found
    return _own_provider()


@functools.cache
def _own_provider() -> Any:
    wanted = any(os.environ.get(name) for name in _ENDPOINTS)
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("an endpoint for OpenTelemetry is set, but no spans are sent: pip install 'segbatch[otel]'")
        return None
    service = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "segbatch"}
    provider = TracerProvider(resource=Resource.create(service))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=_DELAY_MS))
    return provider
