"""The nightly flow: a pipeline file (see ``segbatch run``) with a Prefect task per stage.

``python flows/nightly.py PIPELINE.toml`` runs it now; ``prefect.yaml`` schedules it. A stage is retried as a whole and
goes on where it stopped, because every verb resumes from what is in its output; Ray runs inside the task. Tasks hand
on URIs and figures, never pixels. SIGTERM, a cancelled run and Ctrl-C let shards in flight finish.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows import artifacts
from flows.progress import RunLog
from segbatch import pipeline
from segbatch.errors import EngineError, IncompleteRunError, SegbatchError, StoppedError
from segbatch.pipeline import PipelineConfig

PIPELINE = "infra/pipelines/shelves.toml"
"""The example: works after ``make demo``."""

Headline = dict[str, float | None]


def worth_retrying(task: object, run: object, state: State[Any]) -> bool:
    """Whether the stage that ended in ``state`` may succeed when it is simply run again.

    A wrong configuration, too many bad items or a request to stop stay what they are. A lost store, a lost engine,
    missing rows and everything unknown may pass.
    """
    error = state.data
    if isinstance(error, SegbatchError):
        return error.retryable or isinstance(error, (EngineError, IncompleteRunError))
    return True


_STAGE: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,  # what is done is known from the outputs alone
}


@task(name="ingest", task_run_name="ingest {name}", tags=["segbatch", "ingest"], **_STAGE)
def ingest(config: PipelineConfig, name: str) -> str:
    """Read the dataset into the samples table; returns its run root."""
    return pipeline.ingest_stage(config, RunLog(name, "ingest")).root


@task(name="train", task_run_name="train {name}", tags=["segbatch", "train"], **_STAGE)
def train(config: PipelineConfig, name: str) -> str:
    """Train the model, or go on training it; returns the reference to predict with."""
    return pipeline.train_stage(config, RunLog(name, "train"))


@task(name="predict", task_run_name="predict {name}", tags=["segbatch", "predict"], **_STAGE)
def predict(config: PipelineConfig, name: str) -> str:
    """Predict what is not predicted yet; returns the run root of the masks."""
    return pipeline.predict_stage(config, RunLog(name, "predict")).root


@task(name="evaluate", task_run_name="evaluate {name}", tags=["segbatch", "evaluate"], **_STAGE)
def evaluate(config: PipelineConfig, name: str) -> Headline:
    """Score the masks and publish the figures; returns those over all classes."""
    result = pipeline.evaluate_stage(config, RunLog(name, "evaluate"))
    artifacts.publish_figures(name, result.root, result.figures)
    return {f.metric: f.value for f in result.figures if not f.class_name and not f.slice}


@task(name="report", task_run_name="report {name}", tags=["segbatch", "report"], **_STAGE)
def report(config: PipelineConfig, name: str, headline: Headline) -> str:
    """Write the report and publish where it is, with the worst masks; returns its URI."""
    uri, metrics = pipeline.report_stage(config), config.place("metrics")
    RunLog(name, "report").say(f"report: {uri}")
    artifacts.publish_summary(name, metrics, uri, headline)
    artifacts.publish_worst(name, metrics)
    return uri


def name_of(config: str) -> str:
    """What runs and artifacts of a pipeline file are called: its name in lower-case letters, digits and dashes.

    >>> name_of("infra/pipelines/Store_12 shelves.toml")
    'store-12-shelves'
    """
    return re.sub(r"[^a-z0-9]+", "-", PurePosixPath(config).stem.lower()).strip("-") or "pipeline"


def _run_name() -> str:
    started = flow_run.scheduled_start_time
    return f"{name_of(str(flow_run.parameters.get('config', '')))}-{started:%Y-%m-%d-%H%M}"


@flow(name="nightly", flow_run_name=_run_name)
def nightly(config: str = PIPELINE, sets: list[str] | None = None) -> Headline | State[Any]:
    """Ingest, train, predict, evaluate, report; what is done already is not done again.

    Args:
        config: pipeline file, relative to the checkout.
        sets: changes to it, each ``key=value`` as with ``segbatch run --set``.
    """
    settings = pipeline.load_pipeline(config, tuple(sets or ()))
    name = name_of(config)
    try:
        before: Any = ingest(settings, name)
        if settings.train is not None:
            before = train(settings, name, wait_for=[before])
        masks = predict(settings, name, wait_for=[before])
        headline = evaluate(settings, name, wait_for=[masks])
        report(settings, name, headline)
    except StoppedError as error:
        return Cancelled(message=str(error))
    return headline


def main(arguments: Sequence[str]) -> int:
    """Run the flow once, now; returns the exit code of ``segbatch run``."""
    parser = argparse.ArgumentParser(prog="nightly.py", description="Run a pipeline file as a Prefect flow.")
    parser.add_argument("config", nargs="?", default=PIPELINE, help="pipeline file (TOML)")
    parser.add_argument("--set", dest="sets", action="append", metavar="KEY=VALUE", help="change a setting")
    chosen = parser.parse_args(arguments)
    try:
        pipeline.load_pipeline(chosen.config, tuple(chosen.sets or ()))  # a wrong file is said before Prefect starts
        nightly(chosen.config, chosen.sets)
    except CancelledRun as error:
        print(f"segbatch: {error}", file=sys.stderr)
        return 1
    except SegbatchError as error:
        print(f"segbatch: {error}", file=sys.stderr)
        _let_go(error)
        return error.exit_code
    return 0


def _let_go(error: BaseException | None) -> None:
    """Release what a failed stage held: Prefect keeps its error, and DuckDB complains of what is left at exit."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
