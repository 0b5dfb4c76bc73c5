"""Jobs: a verb with its arguments resolved, and how it is carried out through the run protocol and an engine."""

import contextlib
import functools
import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from segbatch import drivers, schemas, storage, tables, telemetry, tracing
from segbatch.config import EngineConfig, ExecutionConfig, RunOptions, digest_of
from segbatch.engine import Control, Engine, make
from segbatch.errors import BadItemsError, ConfigError, SegbatchError, StoppedError
from segbatch.planning import Preview, changed_file, preview
from segbatch.records import Figure, Outcome, PlanItem
from segbatch.runs import Run, RunState, Task
from segbatch.shards import Shards
from segbatch.telemetry import Meter

if TYPE_CHECKING:
    from segbatch.inference.options import InferenceOptions
    from segbatch.models.registry import ModelSource

_INLINE_BYTES = 4 << 30


class Watch(Protocol):
    """Somebody who looks on. Called in the driver's thread."""

    def say(self, text: str) -> None:
        """One line of news."""
        ...

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        """Work on ``total`` rows begins."""
        ...

    def advance(self, done: int, bad: int) -> None:
        """``done`` of the rows are finished, ``bad`` of them badly."""
        ...

    def end(self) -> None:
        """The work has ended, well or not."""
        ...


class Silent:
    """A Watch that does nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        """Nothing."""

    def advance(self, done: int, bad: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a verb did.

    Attributes:
        state: the whole run root: planned, written, bad.
        rows: rows made by this call.
        seconds: wall time of this call's work, from the moment that a worker was ready.
        start_seconds: wall time until a worker was ready: the engine's start and the model's load.
        figures: of an evaluation.
        copied: good rows that this call took over as they were, because others beside them were made anew.
        record: what was measured, as it stands in the run root; empty where nothing was done.
    """

    state: RunState
    rows: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    figures: tuple[Figure, ...] = field(default_factory=tuple)
    copied: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """URI of the run root."""
        return self.state.root


class BadRunError(BadItemsError):
    """A run with more bad rows than its ``Limits`` allow.

    Args:
        problem: see ``SegbatchError``.
        fix: likewise.
        result: what the verb did all the same, where that is known.
    """

    def __init__(self, problem: str, fix: str = "", result: RunResult | None = None) -> None:
        super().__init__(problem, fix)
        self.args = (problem, fix, result)
        self.result = result


@dataclass(frozen=True, slots=True)
class Limits:
    """When bad items matter: every row is finished first, unless ``fail_fast`` or ``strict``.

    Attributes:
        max_bad_fraction: more bad rows than that are an error.
        fail_fast: stop at the first shard with a bad row.
        strict: stop at the first shard with a bad row, or a good row with an issue.
    """

    max_bad_fraction: float = 0.0
    fail_fast: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"--max-bad-fraction {self.max_bad_fraction} is not between 0 and 1")


# -- jobs: a verb with its arguments resolved ------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A verb ready to run: where to, what decides its output, what it reads, and who does the work."""

    verb: str
    table: str
    out: str
    config: dict[str, Any]
    listing: Callable[[], Iterable[PlanItem]]
    task: Task
    info: Callable[[], dict[str, Any]]
    complete: bool = True
    prefers_ray: bool = False
    unsplit: bool = False
    grouped: bool = False
    settle: Callable[[Run, Shards, Callable[[str], None], Engine], Task] | None = None
    """Gives the task once it is known what there is to do; None: it is ``task`` whatever there is."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which inputs: rows for which an SQL condition holds, the first so many."""

    where: str = ""
    limit: int = 0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"--limit {self.limit} is negative")


@dataclass(frozen=True, slots=True)
class Resplit:
    """Splits of one's own: by a hash of what stays together, so that they hold when data are added.

    Attributes:
        by: ``group_id`` or ``sample_id``; empty keeps the official splits.
        fractions: of train, val and test; two give train and val. Their sum is 1.
    """

    by: str = ""
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)

    def __post_init__(self) -> None:
        if self.by not in ("", "group_id", "sample_id"):
            raise ConfigError(f"--split-by {self.by!r} is not known", "hash:group_id or hash:sample_id")
        good = 2 <= len(self.fractions) <= len(_SPLIT_NAMES) and all(f >= 0 for f in self.fractions)
        if not good or abs(sum(self.fractions) - 1) > 1e-9:
            given = ",".join(f"{f:g}" for f in self.fractions)
            raise ConfigError(f"--fractions {given} are not two or three shares that add up to 1", "e.g. .8,.1,.1")

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that it makes."""
        return _SPLIT_NAMES[: len(self.fractions)]

    def split_of(self, item: PlanItem) -> str:
        """The split of an item; items without a group stand for themselves."""
        key = (item.group_id if self.by == "group_id" else "") or item.sample_id
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        bounds = itertools.accumulate(self.fractions[:-1])
        return _SPLIT_NAMES[sum(place >= bound for bound in bounds)]


_SPLIT_NAMES = ("train", "val", "test")


def ingest_job(
    dataset: str, source: str, out: str, split: Sequence[str], by_reference: bool, resplit: Resplit | None = None
) -> Job:
    """The job of ``api.ingest``."""
    from segbatch.datasets import registry
    from segbatch.stages.ingest import IngestTask

    found, tree = registry.find(dataset, source)
    splits, resplit = tuple(split), resplit or Resplit()
    config: dict[str, Any] = {
        "dataset": found.name,
        "source": tree.source,
        "splits": list(splits),
        "by_reference": by_reference,
    }
    if resplit.by:
        config |= {"split_by": resplit.by, "fractions": list(resplit.fractions)}

    def listing() -> Iterator[PlanItem]:
        items = found.items(tree, splits)
        return (replace(i, split=resplit.split_of(i)) for i in items) if resplit.by else items

    return Job(
        verb="ingest",
        table="samples",
        out=storage.resolve(out),
        config=config,
        listing=listing,
        task=IngestTask(found.name, by_reference),
        info=lambda: {
            "name": found.name,
            "source": tree.source,
            "splits": list(resplit.names if resplit.by else splits or found.splits(tree)),
            "tasks": list(found.tasks),
            "classes": found.classes(tree).to_json(),
        },
        grouped=found.grouped,
    )


def predict_job(
    model: "str | ModelSource",
    input: str,
    out: str,
    classes: str,
    selection: Selection,
    batch_size: int,
    max_pixels: int,
    inference: "InferenceOptions | None" = None,
    wanted: ExecutionConfig | None = None,
) -> Job:
    """The job of ``api.predict``."""
    from segbatch.inference import compose
    from segbatch.stages.predict import PredictTask

    source = compose.source(model, classes, inference) if isinstance(model, str) else model
    spec = source.describe()
    where_from = storage.resolve(input)
    config = {
        "model": source.reference,
        "classes": classes,
        "digest": spec.digest,
        "input": where_from,
        "where": selection.where,
        "limit": selection.limit,
        "max_pixels": max_pixels,
        "schema": schemas.SCHEMA_VERSION,
    }
    wanted = _execution_of(storage.resolve(out), wanted or ExecutionConfig())
    config |= _execution_keys(wanted)
    task = PredictTask(source, spec.digest, batch_size, max_pixels, wanted)
    if inference is not None and inference.said:
        config["inference"] = inference.said
    items = functools.partial(_inputs, where_from, selection.where)
    return Job(
        verb="predict",
        table="masks",
        out=storage.resolve(out),
        config=config,
        listing=(lambda: _first(items(), selection.limit)) if selection.limit else items,
        task=task,
        info=lambda: {"name": source.reference, "digest": spec.digest, "classes": spec.classes.to_json()},
        complete=not selection.limit,
        prefers_ray=True,
        settle=task.settled,
    )


_USUAL = ExecutionConfig()
_ALWAYS_SAID = ("device", "dtype")


def _execution_keys(wanted: ExecutionConfig) -> dict[str, Any]:
    """What the user said of device, number format and engine, as part of a run root's config."""
    said = wanted.model_dump(mode="json")
    unusual = {f"inference.{k}": v for k, v in said.items() if k not in _ALWAYS_SAID and v != getattr(_USUAL, k)}
    return {key: said[key] for key in _ALWAYS_SAID} | unusual


def _execution_of(root: str, wanted: ExecutionConfig) -> ExecutionConfig:
    """What is wanted; of a user who says nothing, what was wanted when the root was begun."""
    document = Run(root, "masks").document() if wanted == _USUAL else None
    if document is None or document["verb"] != "predict":
        return wanted
    said = {key: document["config"].get(f"inference.{key}") for key in ExecutionConfig.model_fields}
    said |= {key: document["config"][key] for key in _ALWAYS_SAID}
    return ExecutionConfig(**{key: value for key, value in said.items() if value is not None})


def _first(items: Iterable[PlanItem], limit: int) -> Iterator[PlanItem]:
    """The items that make the first ``limit`` rows; the last one is cut."""
    for item in items:
        if item.rows >= limit:
            yield replace(item, rows=limit, bytes=item.bytes * limit // item.rows)
            return
        yield item
        limit -= item.rows


def _inputs(source: str, where: str) -> Iterator[PlanItem]:
    """The images of a samples table, a folder, a glob or a list."""
    from segbatch.datasets.images import list_images
    from segbatch.stages.select import sample_ranges

    if tables.has(source, "samples") and tables.parts(tables.find(source, "samples")):
        return sample_ranges(source, where)
    if where:
        raise ConfigError("--where selects rows of a samples table", f"{source} is none; ingest it first")
    return list_images(source)


def evaluate_job(
    masks: str,
    samples: str,
    out: str,
    protocol: str,
    options: Mapping[str, Any] | None = None,
    class_map: Mapping[str, str] | None = None,
) -> Job:
    """The job of ``api.evaluate``; ``options`` as in ``MetricOptions``."""
    from segbatch.metrics import registry
    from segbatch.metrics.base import MetricOptions
    from segbatch.stages import evaluate as stage

    masks, samples = tables.root_of(masks, "masks"), tables.root_of(samples, "samples")
    info = tables.dataset_info(samples)
    name = protocol or registry.default_protocol(str(info["name"]), info.get("tasks", ()))
    chosen = MetricOptions.of(options or {})
    registry.make(name, tables.class_table(samples), chosen)
    ids = stage.label_ids(masks, samples, class_map or {})
    config: dict[str, Any] = {"masks": masks, "samples": samples, "protocol": name}
    if chosen.chosen():
        config["options"] = chosen.chosen()
    if class_map:
        config["class_map"] = dict(class_map)
    if ids:
        config["label_ids"] = {str(theirs): ours for theirs, ours in ids.items()}
    return Job(
        verb="evaluate",
        table="state",
        out=storage.resolve(out),
        config=config,
        listing=lambda: stage.items(masks, samples),
        task=stage.EvaluateTask(masks, samples, name, chosen, ids),
        info=lambda: info,
        unsplit=True,
    )


def import_job(form: str, files: str, samples: str, out: str) -> Job:
    """The job of ``api.import_predictions``."""
    from segbatch.stages import importing as stage

    files, samples = storage.resolve(files), tables.root_of(samples, "samples")
    info = tables.dataset_info(samples)
    return Job(
        verb="import",
        table="masks",
        out=storage.resolve(out),
        config={"format": form, "files": files, "samples": samples},
        listing=lambda: stage.items(form, files, samples),
        task=stage.ImportTask(form),
        info=lambda: {"name": f"import:{form}", "digest": f"import:{form}", "classes": info["classes"]},
    )


def compact_job(source: str, out: str, file_bytes: int) -> Job:
    """The job of ``api.compact``."""
    from segbatch.stages import compact as stage

    run = run_of(source)
    out = storage.resolve(out)
    if run.table == "state":
        raise ConfigError(f"{source} is an evaluation, which is not compacted", "compact the masks and evaluate those")
    if out == run.root or out.startswith(f"{run.root}/"):
        raise ConfigError(f"{out} lies in the run root that is compacted", "choose another output")
    return Job(
        verb="compact",
        table=run.table,
        out=out,
        config={"source": run.root, "table": run.table, "file_bytes": file_bytes},
        listing=lambda: stage.items(run),
        task=stage.CompactTask(run.table),
        info=lambda: tables.dataset_info(run.root),
        unsplit=True,
    )


_TABLES = {"ingest": "samples", "predict": "masks", "import": "masks", "evaluate": "state"}


def run_of(out: str) -> Run:
    """The run at a root that exists."""
    root = storage.resolve(out)
    document = Run(root, "").document()
    if document is None:
        raise ConfigError(f"{out} is not a run root: it has no .segbatch/config.json", "give the OUT of an earlier run")
    if "verb" not in document:
        raise ConfigError(f"{out} holds a trained model, no table", f"segbatch models KIND@{out} tells what it is")
    return Run(root, _TABLES.get(document["verb"]) or document["config"]["table"])


def job_of(out: str, model: "str | ModelSource" = "") -> Job:
    """The job that made a run root, from its config; ``model`` where that was no reference that can be looked up."""
    run = run_of(out)
    document = run.document() or {}
    c: dict[str, Any] = document["config"]
    if document["verb"] == "ingest":
        resplit = Resplit(c.get("split_by", ""), tuple(c.get("fractions", (0.8, 0.1, 0.1))))
        return ingest_job(c["dataset"], c["source"], run.root, c["splits"], c["by_reference"], resplit)
    if document["verb"] == "evaluate":
        return evaluate_job(c["masks"], c["samples"], run.root, c["protocol"], c.get("options"), c.get("class_map"))
    if document["verb"] == "compact":
        return compact_job(c["source"], run.root, c["file_bytes"])
    if document["verb"] == "import":
        return import_job(c["format"], c["files"], c["samples"], run.root)
    from segbatch.inference.options import InferenceOptions

    selection = Selection(c["where"], c["limit"])
    said = InferenceOptions.model_validate(c["inference"]) if "inference" in c else None
    return predict_job(model or c["model"], c["input"], run.root, c["classes"], selection, 0, c["max_pixels"], said)


def dry_run(job: Job, options: RunOptions) -> Preview:
    """What a verb would do; writes nothing."""
    found = Run(job.out, job.table).document()
    if found is not None:
        Run.open(job.out, job.table, job.verb, job.config)
    listing = tuple if _is_chosen(job) else job.listing
    return preview(job.out, listing, options.plan, job.complete, job.grouped)


# -- carrying a job out ----------------------------------------------------------------------------------------------


def carry_out(job: Job, limits: Limits, options: RunOptions, watch: Watch, failed: bool = False) -> RunResult:
    """Open the root, plan what is new, do what is missing (or redo what failed), finish."""
    with tracing.span(f"segbatch {job.verb}", attributes={"root": job.out}) as note:
        run, listing = opened(job)
        with drivers.beating(run.root, job.verb) as heartbeat:
            rounds = planned(run, job, listing, options, failed)
            result = completed(run, job, rounds, limits, options, Beating(watch, heartbeat), Done())
        note({"rows": result.rows, "bad_in_root": result.state.bad})
        return result


def opened(job: Job) -> tuple[Run, Callable[[], Iterable[PlanItem]]]:
    """The job's run, and its listing."""
    is_new = Run(job.out, job.table).document() is None
    listing = _begun(job) if is_new else job.listing  # a wrong input must not claim the root
    return Run.open(job.out, job.table, job.verb, job.config), listing


def planned(
    run: Run, job: Job, listing: Callable[[], Iterable[PlanItem]], options: RunOptions, failed: bool = False
) -> Iterator[Shards]:
    """Plan what is new; gives what there is to do, until nothing is."""
    plan = options.plan.model_copy(update={"shard_rows": 2**31}) if job.unsplit else options.plan

    def describe() -> None:
        """Before a plan is there to be worked on: new inputs may bring new classes."""
        tables.write_dataset_info(run.root, job.info())

    if failed:
        run.clear_quarantine()
        rounds = iter([run.to_retry()])
    else:
        adopted = _is_chosen(job) or run.plan(listing, plan, job.complete, job.grouped, describe) is None
        rounds = _rounds(run, adopted)
    if not storage.exists(tables.service(run.root, "dataset.json")):
        describe()
    return rounds


def completed(
    run: Run,
    job: Job,
    rounds: Iterable[Shards],
    limits: Limits,
    options: RunOptions,
    watch: Watch,
    done: "Done",
) -> RunResult:
    """Do what there is to do, and finish; ``done`` is what this call of the verb did before."""
    stop = threading.Event()
    record: dict[str, Any] = {}
    try:
        try:
            for todo in rounds:
                if todo and not stop.is_set():
                    work(run, job, todo, limits, options.engine, watch, stop, done)
        except BaseException as error:
            with contextlib.suppress(SegbatchError):  # a store that is gone must not hide why
                record = recorded(run, job, options, done, error)
            raise
        record = recorded(run, job, options, done)
        result = done.result(run.finish(), record)
        watch.say(_summary(result))
        if line := done.meter.line(done.seconds):
            watch.say(line)
        if stop.is_set():
            raise StoppedError(f"stopped after segbatch {job.verb} was done", "run the same command again to go on")
        _check_bad(result.state, limits)
    except BadItemsError as error:
        raise BadRunError(error.problem, error.fix, done.result(run.state(), record)) from error
    return result


def recorded(
    run: Run, job: Job, options: RunOptions, done: "Done", error: BaseException | None = None
) -> dict[str, Any]:
    """The record of this call, written; empty where it found nothing to do."""
    if not done.began:
        return {}
    hours = (done.seconds + done.start_seconds) / 3600
    price, images = options.cost.per_hour * hours, done.meter.rows
    record = {
        "verb": job.verb,
        "ended": "done" if error is None else f"{type(error).__name__}: {error}",
        "config": digest_of(job.config),
        "seconds": round(done.seconds, 3),
        "start_seconds": round(done.start_seconds, 3),
        **done.meter.to_json(done.seconds),
        "quarantined_in_root": len(run.quarantine()),
        "surroundings": telemetry.surroundings(),
    }
    if price and images:
        record["cost_per_1000_images"] = round(1000 * price / images, 6)
        record["currency"] = options.cost.currency
    telemetry.write(run.root, record)
    return record


@runtime_checkable
class SeesWorkers(Protocol):
    """A Watch that wants to know where the actors are."""

    def work_at(self, places: Sequence[str]) -> None:
        """They are there now."""
        ...


@runtime_checkable
class SeesOthers(Protocol):
    """A Watch that wants to know what other drivers did of the same work."""

    def others_did(self, rows: int) -> None:
        """So many more rows."""
        ...


class Beating:
    """A Watch that tells the driver's heartbeat, too."""

    def __init__(self, watch: Watch, heartbeat: drivers.Heartbeat) -> None:
        self._watch, self._heartbeat = watch, heartbeat
        self.say = watch.say

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        """See ``Watch``."""
        self._heartbeat.begin(total)
        self._watch.begin(what, total, unit)

    def work_at(self, places: Sequence[str]) -> None:
        """See ``SeesWorkers``."""
        self._heartbeat.work_at(places)

    def others_did(self, rows: int) -> None:
        """See ``SeesOthers``."""
        self._heartbeat.others_did(rows)

    def advance(self, done: int, bad: int) -> None:
        """See ``Watch``."""
        self._heartbeat.advance(done, bad)
        self._watch.advance(done, bad)

    def end(self) -> None:
        """See ``Watch``."""
        self._heartbeat.end()
        self._watch.end()


@dataclass(slots=True)
class Done:
    """What a call of a verb did so far; see ``RunResult``."""

    rows: int = 0
    copied: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    began: bool = False
    meter: Meter = field(default_factory=Meter)

    def result(self, state: RunState, record: Mapping[str, Any] | None = None) -> RunResult:
        """As the verb gives it."""
        return RunResult(state, self.rows, self.seconds, self.start_seconds, copied=self.copied, record=record or {})


def _is_chosen(job: Job) -> bool:
    """Whether an earlier run has chosen the first so many images already; they stay those.

    Raises:
        ConfigError: some of them are not done, and their file is another version now.
    """
    run = Run(job.out, job.table)
    if job.complete or not run.plans():
        return False
    if changed := changed_file(run.missing()):
        raise ConfigError(f"{changed} has changed since --limit chose rows of it", "choose a new output")
    return True


def _begun(job: Job) -> Callable[[], Iterable[PlanItem]]:
    """The job's listing, its first item already seen: a listing may cost a large annotation file.

    Raises:
        ConfigError: it is empty, or what the listing raises.
    """
    stream = iter(job.listing())
    first = next(stream, None)
    if first is None:
        raise ConfigError(f"segbatch {job.verb}: the input holds no image that is selected", "check the selection")
    begun = [itertools.chain((first,), stream)]
    return lambda: begun.pop() if begun else job.listing()


def _rounds(run: Run, adopted: bool) -> Iterator[Shards]:
    """What is missing, until nothing is: another driver may publish a plan while this one works.

    Somebody else may be at work on an ``adopted`` plan, from its start: begin anywhere in it, so that two share it.
    """
    before: Shards | None = None
    while todo := run.lacking():
        if before is not None and todo.same_as(before):
            return  # no progress: ``finish`` says what is missing
        before = todo
        yield todo.from_place(random.randrange(len(todo)) if adopted else 0)


def work(
    run: Run,
    job: Job,
    todo: Shards,
    limits: Limits,
    config: EngineConfig,
    watch: Watch,
    stop: threading.Event,
    done: Done,
) -> None:
    """Map the shards, and add to ``done``."""
    done.began = True
    kind = config.kind if config.kind != "auto" else _pick_engine(job, todo)
    if kind == "ray" and storage.is_private(run.root):
        raise ConfigError(f"{run.root} is in this process's memory, which actors cannot see", "use --engine inline")
    engine = make(config.model_copy(update={"kind": kind}))
    counts = _Counts(watch, job.verb, *_rows_to_do(run, todo))
    if kind == "ray":
        watch.say("starting Ray ...")
    control = Control(
        stop=stop,
        quarantine=run.quarantine(),
        on_quarantine=run.add_quarantine,
        on_ready=counts.ready,
        on_rows=counts.partial,
        on_workers=watch.work_at if isinstance(watch, SeesWorkers) else lambda places: None,
        meter=done.meter,
        trace=tracing.here(),
    )
    try:
        with draining(control.stop, watch):
            engine.start()
        # In between, a signal ends it at once: nothing is in flight
        task = job.settle(run, todo, watch.say, engine) if job.settle is not None and not stop.is_set() else job.task
        with draining(control.stop, watch), contextlib.closing(engine.map(task, todo, control)) as outcomes:
            for outcome in outcomes:
                run.record(outcome)
                counts.add(outcome)
                done.meter.add(outcome)
                _check_outcome(run, outcome, limits)
    finally:
        counts.add_to(done)
        watch.end()
        engine.close()
        storage.sweep_temporary(run.root)
        run.flush()


def _rows_to_do(run: Run, todo: Shards) -> tuple[int, bool]:
    """Rows to make, or to look at where files have changed; and whether those that are copied are none of them."""
    return (run.state().bad, True) if todo.retry else (todo.rows, False)


def _check_outcome(run: Run, outcome: Outcome, limits: Limits) -> None:
    found = {**outcome.reasons, **(outcome.issues if limits.strict else {})}
    if found and (limits.fail_fast or limits.strict):
        option = "--strict" if limits.strict else "--fail-fast"
        first = next(run.complaints(outcome.shard, limits.strict), "")
        raise BadItemsError(
            f"{_reasons(found)} in shard {outcome.shard}{f'; first: {first}' if first else ''}",
            f"mend it or leave out {option}",
        )


def _pick_engine(job: Job, todo: Shards) -> Literal["ray", "inline"]:
    """Ray where there is a model or a cluster or much to read; its start is not worth it for less."""
    big = todo.bytes > _INLINE_BYTES
    return "ray" if job.prefers_ray or "RAY_ADDRESS" in os.environ or big else "inline"


class _Counts:
    """Adds up outcomes for the progress bar, and takes the time from the moment that a worker is ready."""

    def __init__(self, watch: Watch, what: str, total: int, without_copies: bool) -> None:
        self._watch, self._what, self._total = watch, what, total
        self._without_copies = without_copies
        self._began = time.monotonic()
        self._ready: float | None = None
        self._rows = self._bad = self._own = self._copied = 0

    def ready(self) -> None:
        """Work begins."""
        if self._ready is None:
            self._ready = time.monotonic()
            self._watch.begin(self._what, self._total)

    def add_to(self, done: Done) -> None:
        """Rows of this driver, seconds of work, and seconds before it (engine's start, model load)."""
        ready = self._ready if self._ready is not None else self._began
        done.rows, done.copied = done.rows + self._own, done.copied + self._copied
        done.seconds += time.monotonic() - ready
        done.start_seconds += ready - self._began

    def add(self, outcome: Outcome) -> None:
        """A shard is finished."""
        self._rows += outcome.rows - (outcome.copied if self._without_copies else 0)
        self._bad += outcome.bad
        if not outcome.committed_by_other:
            self._own += outcome.rows - outcome.copied
            self._copied += outcome.copied
        elif isinstance(self._watch, SeesOthers):
            self._watch.others_did(outcome.rows)
        self.partial(0)

    def partial(self, rows: int) -> None:
        """Rows of all shards, finished or not; of a volume more are made again than were bad."""
        self._watch.advance(min(max(rows, self._rows), self._total), self._bad)


@contextlib.contextmanager
def draining(stop: threading.Event, watch: Watch) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C drain; the second Ctrl-C stops at once. Only the main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        watch.say("stopping: what is in flight is finished first")

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_bad(state: RunState, limits: Limits) -> None:
    if state.rows and state.bad / state.rows > limits.max_bad_fraction:
        raise BadItemsError(
            f"{state.bad} of {state.rows} images are bad ({_reasons(state.reasons)}), more than "
            f"--max-bad-fraction {limits.max_bad_fraction:g} allows; every other row is done",
            f'see: segbatch query {state.root} "SELECT * EXCLUDE ({_BULKY[state.table]}) FROM {state.table} '
            f"WHERE status <> 'ok'\"; when mended: segbatch retry {state.root} --failed",
        )


_BULKY = {
    "masks": "semantic, class_pixels",
    "samples": "image, semantic, instances, panoptic, label_maps",
    "state": "joint",
}


def _reasons(reasons: Any) -> str:
    return ", ".join(f"{n} {code}" for code, n in sorted(reasons.items(), key=lambda r: -r[1]))


def _summary(result: RunResult) -> str:
    state, rows, seconds = result.state, result.rows, result.seconds
    rate = f", {rows / seconds:.1f} images/s" if rows and seconds > 0 else ""
    bad = f", {state.bad} bad ({_reasons(state.reasons)})" if state.bad else ""
    bad += f", issues in good ones: {_reasons(state.issues)}" if state.issues else ""
    copied = f", {result.copied} kept as they were" if result.copied else ""
    new = f"{rows} done now in {seconds:.1f} s{rate}{copied}" if rows or copied else "nothing was left to do"
    return f"{state.rows_done} of {state.rows} images in {state.shards} shards{bad}; {new}"
