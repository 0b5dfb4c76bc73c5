"""Spans of a run in one process; tests/integration/test_observability.py has those of actors."""

import subprocess
import sys
from pathlib import Path

import photos
import pytest
from doubles import FreeModel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from segbatch import api, tracing
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import ConfigError

OPTIONS = RunOptions(engine=EngineConfig(kind="inline", threads=1), plan=PlanConfig(shard_rows=4))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_own_provider", lambda: provider)
    return exporter


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_a_verb_is_a_span_and_its_shards_are_below_it(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    photos.folder(tmp_path / "in", 10)
    api.predict(FreeModel(), str(tmp_path / "in"), str(tmp_path / "out"), options=OPTIONS)
    *shards, verb = spans.get_finished_spans()
    assert verb.name == "segbatch predict" and verb.parent is None and verb.context
    assert attributes(verb) == {"segbatch.root": str(tmp_path / "out"), "segbatch.rows": 10, "segbatch.bad_in_root": 0}
    assert {(s.name, s.parent.span_id if s.parent else 0) for s in shards} == {("segbatch shard", verb.context.span_id)}
    assert sorted(int(str(attributes(s)["segbatch.rows"])) for s in shards) == [2, 4, 4]
    assert all("segbatch.seconds.model" in attributes(s) for s in shards)


def test_an_error_ends_its_span_as_failed(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError):
        api.predict(FreeModel(), str(tmp_path / "in"), str(tmp_path / "out"), options=OPTIONS)
    (verb,) = spans.get_finished_spans()
    assert not verb.status.is_ok and "ConfigError" in (verb.status.description or "")


def test_without_an_endpoint_nothing_is_imported() -> None:
    script = (
        "import sys\nfrom segbatch import tracing\n"
        "with tracing.span('x') as note:\n    note({'a': 1})\n    assert tracing.here() == {}\ntracing.flush()\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={})


def test_a_missing_extra_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    tracing._own_provider.cache_clear()
    with tracing.span("x"):
        assert tracing.here() == {}
    tracing._own_provider.cache_clear()
    assert "pip install 'segbatch[otel]'" in caplog.text
