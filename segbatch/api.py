"""The verbs. The command line and the flows call these and nothing else.

``segbatch.predict("litert:model.tflite", "photos", "out")`` does what ``segbatch predict`` does. A verb raises a
``SegbatchError`` when something is wrong, and returns what it did otherwise.
"""

import dataclasses
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from segbatch import schemas, storage, tables
from segbatch.config import ExecutionConfig, RunOptions, load_toml, read_toml
from segbatch.errors import ConfigError, SegbatchError
from segbatch.jobs import (
    Job,
    Limits,
    Resplit,
    RunResult,
    Selection,
    Silent,
    Watch,
    carry_out,
    compact_job,
    draining,
    dry_run,
    evaluate_job,
    import_job,
    ingest_job,
    job_of,
    predict_job,
    run_of,
)
from segbatch.planning import Preview
from segbatch.runs import RunStatus

if TYPE_CHECKING:
    from segbatch.cleanup import Cleanup
    from segbatch.inference.options import InferenceOptions
    from segbatch.metrics.base import MetricOptions
    from segbatch.models.catalogue import Card
    from segbatch.models.registry import ModelSource
    from segbatch.stages.compare import Difference
    from segbatch.stages.exporting import Exported
    from segbatch.stages.totals import Analysis
    from segbatch.stages.verify import Verified
    from segbatch.training import TrainConfig, TrainResult

MAX_PIXELS = 200_000_000
MAX_FILE_BYTES = 1 << 30
"""Of a file of a compacted root: one PUT writes it."""


# -- the verbs -----------------------------------------------------------------------------------------------------


def ingest(
    dataset: str,
    source: str,
    out: str,
    *,
    split: Sequence[str] = (),
    by_reference: bool = False,
    resplit: Resplit | None = None,
    limits: Limits | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Read a dataset in its official layout into a samples table.

    Args:
        dataset: a name of ``segbatch datasets``, or ``auto``.
        source: its root folder or URL.
        out: the run root to write.
        split: splits to read; all when empty.
        by_reference: store only the image's URI, not its bytes.
        resplit: splits of one's own instead of the official ones.
        limits: how many bad rows are acceptable.
        options: shards and engine.
        watch: who looks on.

    Raises:
        ConfigError: unknown dataset or split, a source of another layout, or an output of another configuration.
        BadItemsError: more rows are bad than allowed; every row is written.
    """
    job = ingest_job(dataset, source, out, split, by_reference, resplit)
    watch = watch or Silent()
    if dataset == "auto":
        watch.say(f"{source} looks like {job.config['dataset']}")
    return carry_out(job, limits or Limits(), options or RunOptions(), watch)


def predict(
    model: "str | ModelSource",
    input: str,
    out: str,
    *,
    classes: str = "",
    batch_size: int = 0,
    where: str = "",
    limit: int = 0,
    max_pixels: int = MAX_PIXELS,
    inference: "InferenceOptions | None" = None,
    limits: Limits | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Run a model over a samples table, a folder, a glob or a list of images into a masks table.

    Args:
        model: ``loader:reference``, ``name@checkpoint``, several joined by ``+``, ``cascade:DETECTOR,SEGMENTER``, or
            any ``ModelSource``.
        input: samples root, folder, glob, or a text file with a URI per line.
        out: the run root to write.
        classes: a file that names the model's classes, where the model does not.
        batch_size: photos per call of the model; 0 picks it.
        where: SQL condition over the columns of a samples table, e.g. ``split = 'val'``.
        limit: only the first so many images; 0 takes all.
        max_pixels: larger photos become bad rows.
        inference: tiles, views, and which detections count.
        limits: how many bad rows are acceptable.
        options: shards, engine, and in which number format the model computes.
        watch: who looks on.

    Raises:
        ConfigError: unknown model or input, or an output of another configuration.
        BadItemsError: more rows are bad than allowed; every row is written.
    """
    wanted = options.inference if options else None
    job = predict_job(model, input, out, classes, Selection(where, limit), batch_size, max_pixels, inference, wanted)
    return carry_out(job, limits or Limits(), options or RunOptions(), watch or Silent())


def predict_many(
    models: "Mapping[str, str | ModelSource]",
    input: str,
    out: str,
    *,
    limits: Limits | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
    **choice: Any,
) -> dict[str, RunResult]:
    """Run several models over the same images in one pass: every image is read and decoded once.

    Every model has the run root ``out/<alias>``, which is as ``predict`` makes it alone, and which every other verb
    takes. What a root has already is not made again.

    Args:
        models: by their aliases, of letters, digits, ``_`` and ``-``; as ``predict`` takes them.
        input: as for ``predict``.
        out: the folder of the run roots.
        limits: how many bad rows are acceptable of each model.
        options: shards, engine, and in which number format the models compute.
        watch: who looks on.
        choice: whatever else ``predict`` takes, for all models alike.

    Returns:
        What became of each model, by its alias.

    Raises:
        ConfigError: unknown model or input, a wrong alias, or an output of another configuration.
        BadItemsError: more rows of a model are bad than allowed; every row of every model is written.
    """
    from segbatch.one_pass import carry_out_together, check_aliases

    check_aliases(models)
    root = storage.resolve(out)
    wanted = options.inference if options else None
    jobs = {a: _predict_job_of(m, input, storage.join(root, a), wanted, **choice) for a, m in models.items()}
    return carry_out_together(root, jobs, limits or Limits(), options or RunOptions(), watch or Silent())


def _predict_job_of(
    model: "str | ModelSource",
    input: str,
    out: str,
    wanted: ExecutionConfig | None,
    *,
    classes: str = "",
    batch_size: int = 0,
    where: str = "",
    limit: int = 0,
    max_pixels: int = MAX_PIXELS,
    inference: "InferenceOptions | None" = None,
) -> Job:
    return predict_job(model, input, out, classes, Selection(where, limit), batch_size, max_pixels, inference, wanted)


def evaluate(
    masks: str,
    samples: str,
    out: str,
    *,
    protocol: str = "",
    metric: "MetricOptions | None" = None,
    class_map: Mapping[str, str] | None = None,
    analysis: "Analysis | None" = None,
    missing: Literal["error", "skip", "partial"] = "error",
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Score a masks table against a samples table by an official protocol; writes summary, images and confusion.

    Args:
        masks: run root of the predictions.
        samples: run root of the ground truth.
        out: the run root to write.
        protocol: a name of ``segbatch metrics``; the dataset's own when empty.
        metric: what the protocol's official evaluator leaves to its caller; see ``metrics.base.MetricOptions``.
        class_map: classes of the samples by those of the masks, by name; the others are matched by their names.
        analysis: slices, and intervals by the bootstrap.
        missing: ``skip`` leaves images without a good prediction out, and counts them; ``partial`` only those that the
            run that predicts has not come to yet. With ``error``, images without a row of masks count as ones in which
            nothing was found, where the official evaluator has it so (``metrics.base.CountsMissing``).
        options: shards and engine.
        watch: who looks on.

    Raises:
        ConfigError: unknown protocol, missing tables, or an output of another configuration.
        IncompleteRunError: images without a good prediction, and ``missing`` is ``error``.
    """
    from segbatch.metrics.base import DEFAULTS
    from segbatch.stages import evaluate_finish as stage
    from segbatch.stages import slices

    job = evaluate_job(masks, samples, out, protocol, (metric or DEFAULTS).chosen(), class_map)
    slices.check(job.config["samples"], analysis.slices if analysis else ())
    result = carry_out(job, Limits(1.0), options or RunOptions(), watch or Silent())
    c = job.config
    figures = stage.finish(
        job.out, c["masks"], c["samples"], c["protocol"], missing, options=metric or DEFAULTS, analysis=analysis
    )
    return replace(result, figures=tuple(figures.figures))


def compare(
    first: str,
    second: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
    by: Literal["group", "image"] = "group",
    paired: bool = True,
) -> "list[Difference]":
    """Figures of two evaluations by one protocol, their differences and 95 % intervals; see ``stages.compare``.

    Raises:
        ConfigError: no evaluations, two protocols, or (paired) other images.
    """
    from segbatch.stages import compare as stage

    return stage.compare(first, second, resamples, seed, by, paired)


def import_predictions(
    form: str,
    files: str,
    samples: str,
    out: str,
    *,
    limits: Limits | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Read other people's predictions into a masks table, one row for every good sample.

    Args:
        form: a name of ``segbatch formats``.
        files: the file, folder or archive that holds them.
        samples: run root of the samples they were made for.
        out: the run root to write.
        limits: how many samples may lack a good prediction.
        options: shards and engine.
        watch: who looks on.

    Raises:
        ConfigError: an unknown format, files of another one, or predictions of images that are no samples.
        BadItemsError: more rows are bad than allowed; every row is written.
    """
    job = import_job(form, files, samples, out)
    return carry_out(job, limits or Limits(), options or RunOptions(), watch or Silent())


def export(
    form: str,
    masks: str,
    samples: str,
    out: str,
    *,
    missing: Literal["error", "skip"] = "error",
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> "Exported":
    """Write masks in the form that an evaluation server or another tool takes.

    Args:
        form: a name of ``segbatch formats``.
        masks: run root of the predictions; the samples root itself exports their ground truth.
        samples: run root of the samples.
        out: folder to write; files of an earlier export are replaced.
        missing: ``skip`` leaves bad rows out, and counts them.
        options: threads of the engine.
        watch: who looks on.

    Raises:
        ConfigError: an unknown format, or tables without what it needs.
        IncompleteRunError: bad rows, and ``missing`` is ``error``.
        DataError: a row that the format cannot hold, named.
    """
    import os

    from segbatch.formats import registry
    from segbatch.stages.exporting import export as write

    out, watch = storage.resolve(out), watch or Silent()
    threads = (options or RunOptions()).engine.threads or len(os.sched_getaffinity(0))
    done = write(registry.format_of(form), masks, samples, out, threads, missing == "skip")
    skipped = f"; {done.skipped} rows left out that are bad or have no such label" if done.skipped else ""
    skipped += f"; {done.lacking} good samples have no mask" if done.lacking else ""
    watch.say(f"{done.rows} images in {done.files} files ({done.bytes / 1e6:.1f} MB) below {out}{skipped}")
    return done


def retry(
    out: str,
    *,
    model: "str | ModelSource" = "",
    limits: Limits | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Redo only the rows whose status is an error, in place; good rows are copied, other shards not touched.

    Args:
        out: the run root of an ingest, a predict or an import.
        model: needed only where ``predict`` was given a ``ModelSource`` of one's own; it must be the same model.
        limits: how many bad rows are acceptable.
        options: the engine.
        watch: who looks on.

    Raises:
        ConfigError: ``out`` is not a run root, or its verb cannot be retried.
    """
    job = job_of(out, model)
    if job.verb == "compact":
        source = job.config["source"]
        raise ConfigError(f"{out} is a compacted copy", f"segbatch retry {source} --failed, then compact again")
    if job.verb == "evaluate":
        raise ConfigError(f"{out} was made by segbatch {job.verb}, which has nothing to retry", "retry its input")
    return carry_out(job, limits or Limits(), options or RunOptions(), watch or Silent(), failed=True)


def status(out: str) -> RunStatus:
    """Where a run stands and who is at work on it, from any machine.

    A driver on another machine is known by its heartbeat, every ten seconds: with one, or after one that died, this
    takes up to half a minute.

    Raises:
        ConfigError: ``out`` is not a run root.
    """
    return run_of(out).status()


def compact(
    source: str,
    out: str,
    *,
    file_bytes: int = 256 << 20,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Copy a complete run into fewer, larger files: the same rows in the same order; ``source`` is only read.

    Args:
        source: the run root of an ingest, a predict, an import, or a compact.
        out: the run root to write.
        file_bytes: about how large a file may become; a larger one of ``source`` stays as it is.
        options: the engine.
        watch: who looks on.

    Raises:
        ConfigError: ``source`` is no run root or an evaluation, or ``out`` is of another configuration.
        IncompleteRunError: ``source`` lacks shards.
        SchemaError: a file of ``source`` is damaged; says which.
    """
    if not 0 < file_bytes <= MAX_FILE_BYTES:
        raise ConfigError(f"files of {file_bytes / 2**20:g} MB are not written", f"at most {MAX_FILE_BYTES >> 20}")
    job = compact_job(source, out, file_bytes)
    options = options or RunOptions()
    plan = options.plan.model_copy(update={"shard_bytes": file_bytes})
    return carry_out(job, Limits(1.0), options.model_copy(update={"plan": plan}), watch or Silent())


def gc(
    roots: Sequence[str], *, keep_runs: int | None = None, incomplete: bool = False, dry_run: bool = False
) -> "Cleanup":
    """Remove what run roots hold that nobody needs, and the oldest of many runs; see ``segbatch.cleanup``.

    Args:
        roots: run roots, or with ``keep_runs`` folders of run roots.
        keep_runs: so many complete runs of each verb stay; None removes no runs.
        incomplete: runs that were never finished may go, too.
        dry_run: only say what would go.

    Raises:
        ConfigError: no run roots there, or the only one is in use.
    """
    from segbatch import cleanup

    if keep_runs is not None and keep_runs < 1:
        raise ConfigError(f"--keep-runs {keep_runs} keeps nothing", "delete the folder yourself if that is meant")
    if incomplete and keep_runs is None:
        raise ConfigError("--incomplete says which runs may go, and none may", "add --keep-runs N")
    found = cleanup.find(roots, run_of, keep_runs, incomplete)
    return found if dry_run else cleanup.remove(found)


def verify(out: str, *, options: RunOptions | None = None, watch: Watch | None = None) -> "Verified":
    """Read every file of a run root again and say what is wrong with which.

    Args:
        out: the run root.
        options: threads of the engine.
        watch: who looks on.

    Raises:
        ConfigError: ``out`` is not a run root.
    """
    import os

    from segbatch.stages.verify import verify as look

    run, watch = run_of(out), watch or Silent()
    threads = (options or RunOptions()).engine.threads or len(os.sched_getaffinity(0))
    watch.begin("verify", run.shards().rows, "rows")
    try:
        return look(run, threads, watch.advance)
    finally:
        watch.end()


def report(metrics: str, out: str, worst: int = 20) -> str:
    """Write the HTML page of an evaluation; returns its URI."""
    from segbatch.report import write_report

    return write_report(storage.resolve(metrics), storage.resolve(out), worst)


def train(config: "TrainConfig", watch: Watch | None = None) -> "TrainResult":
    """Train a model on a samples table; resumes from its last checkpoint.

    Raises:
        ConfigError: an output of another configuration, or a samples table that cannot be trained on.
    """
    from segbatch import training

    watch = watch or Silent()
    stop = threading.Event()
    watch.begin("train", 100, "%")
    try:
        with draining(stop, watch):
            result = training.train(config, lambda p: watch.advance(int(100 * p.fraction), 0), stop.is_set)
    finally:
        watch.end()
    watch.say(_training_summary(result))
    return result


def _training_summary(result: "TrainResult") -> str:
    loss = f", loss {result.loss:.3f}" if result.loss is not None else ""
    shown = {"mIoU": result.val_miou, "mask AP": result.val_ap, "AP50": result.val_ap50, "PQ": result.val_pq}
    figures = "".join(f", validation {name} {value:.3f}" for name, value in shown.items() if value is not None)
    skipped = f", {sum(result.skipped.values())} bad samples left out" if result.skipped else ""
    resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
    minutes = f"{result.cpu_s / 60:.1f} CPU minutes"
    return f"trained {result.steps} steps on {result.samples} samples in {minutes}{loss}{figures}{skipped}{resumed}"


def load_train_config(uri: str, out: str = "", sets: Sequence[str] = ()) -> "TrainConfig":
    """Read a training file; ``out`` overrides the one in it."""
    from segbatch.training import TrainConfig

    return load_toml(TrainConfig, uri, [*sets, *([f"out={json.dumps(out)}"] if out else [])])


def load_class_map(uri: str) -> dict[str, str]:
    """Classes of the samples by those of the masks, from the table ``classes`` of a TOML file.

    Raises:
        ConfigError: no such file, no TOML, or no such table of texts.
    """
    found = read_toml(uri)
    classes = found.get("classes")
    if (
        set(found) != {"classes"}
        or not isinstance(classes, dict)
        or any(not isinstance(v, str) for v in classes.values())
    ):
        problem = f"{uri} is no class map"
        raise ConfigError(problem, 'write [classes] and lines "class of the masks" = "class of the samples"')
    return dict(classes)


def query(out: str, sql: str) -> "Any":
    """Run SQL over the tables of a run root (each is a view of its name); returns a pyarrow Table.

    The query cannot read or write any other file.

    Raises:
        ConfigError: ``out`` has no tables, or the SQL is wrong.
    """
    import duckdb
    import pyarrow.dataset as ds

    root = storage.resolve(out)
    found = [t for t in schemas.TABLES if tables.has(root, t)]
    if not found:
        raise ConfigError(f"{out} has no tables", f"a run root holds one of {', '.join(schemas.TABLES)}")
    with duckdb.connect(config={"enable_external_access": False, "python_enable_replacements": False}) as db:
        for table in found:
            uris = [p.uri for p in tables.parts(tables.find(root, table))]
            paths = [storage.arrow_filesystem(u)[1] for u in uris]
            filesystem = storage.arrow_filesystem(root)[0]
            db.register(table, ds.dataset(paths, schema=schemas.TABLES[table], filesystem=filesystem, format="parquet"))
        db.execute("SET lock_configuration=true")
        try:
            found_rows = db.sql(sql)
            if found_rows is None:
                raise ConfigError("SQL: the statement gives no rows", "write a SELECT")
            return found_rows.to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(f"SQL: {str(error).splitlines()[0]}", f"tables: {', '.join(found)}") from error


def preview_ingest(
    dataset: str,
    source: str,
    out: str,
    *,
    split: Sequence[str] = (),
    by_reference: bool = False,
    resplit: Resplit | None = None,
    options: RunOptions | None = None,
) -> Preview:
    """What ``ingest`` would do; writes nothing."""
    return dry_run(ingest_job(dataset, source, out, split, by_reference, resplit), options or RunOptions())


def preview_predict(
    model: "str | ModelSource",
    input: str,
    out: str,
    *,
    classes: str = "",
    where: str = "",
    limit: int = 0,
    max_pixels: int = MAX_PIXELS,
    inference: "InferenceOptions | None" = None,
    options: RunOptions | None = None,
) -> Preview:
    """What ``predict`` would do; writes nothing."""
    wanted = options.inference if options else None
    job = predict_job(model, input, out, classes, Selection(where, limit), 0, max_pixels, inference, wanted)
    return dry_run(job, options or RunOptions())


def catalogue(family: Literal["models", "datasets", "metrics", "formats"]) -> list[dict[str, str]]:
    """Name and one-line summary of every registered model, dataset, metric or format."""
    from segbatch.datasets import registry as datasets
    from segbatch.formats import registry as formats
    from segbatch.metrics import registry as metrics

    if family == "datasets":
        found = {n: _first_line(datasets.dataset(n)) for n in datasets.names()}
    elif family == "formats":
        found = {n: _first_line(formats.format_of(n)) for n in formats.names()}
    elif family == "metrics":
        found = {n: _first_line(metrics.metric(n)) for n in metrics.names()}
    else:
        return _models()
    return [{"name": n, "summary": text} for n, text in found.items()]


def _models() -> list[dict[str, str]]:
    """What can stand as MODEL; a line for every form of a built-in network."""
    from segbatch.models import architectures, catalogue
    from segbatch.models import registry as models

    cards = {n: [c for c in catalogue.cards() if c.architecture == n] for n in architectures.architectures()}
    found: list[dict[str, str]] = []
    for name, entry in architectures.architectures().items():
        base = {"name": f"{name}@CHECKPOINT", "task": entry.task, "summary": entry.summary, "licence": "yours"}
        blank = {"form": "", "parameters": "", "input": "", "images_per_s": ""}
        forms = [
            {
                "form": card.form,
                "parameters": f"{card.parameters:,}",
                "input": f"{card.width}x{card.height}",
                "images_per_s": f"{card.images_per_s:g}",
            }
            for card in cards[name]
        ]
        found += [{**base, **form} for form in forms or [blank]]
    for name, loader in models.loaders().items():
        said = {"name": f"{name}:REFERENCE", "task": "the file's", "summary": _first_line(loader)}
        found.append({**said, "licence": "the file's", "form": "", "parameters": "", "input": "", "images_per_s": ""})
    return found


def describe_model(name: str) -> dict[str, Any]:
    """All that is known of an architecture, a loader, or the model that a reference names.

    Args:
        name: ``fcn``, ``hf``, or a reference as ``predict`` takes it.

    Raises:
        ConfigError: nothing of that name, or a model that cannot be read.
    """
    from segbatch.inference import compose
    from segbatch.models import architectures, catalogue
    from segbatch.models import registry as models

    built_in, loaders = architectures.architectures(), models.loaders()
    plain = name.removesuffix("@CHECKPOINT").removesuffix(":REFERENCE")
    if plain in built_in:
        entry = built_in[plain]
        return {
            "name": f"{plain}@CHECKPOINT",
            "task": entry.task,
            "summary": entry.summary,
            "paper": entry.paper,
            "forms": [_form(c) for c in catalogue.cards() if c.architecture == plain],
            "measured_on": catalogue.machine(),
            "options": _options_of(entry.config),
            "train": f"segbatch train CONFIG.toml OUT --set model.kind={plain}",
            "predict": f"segbatch predict {plain}@OUT PHOTOS MASKS",
        }
    if plain in loaders:
        doc = inspect.getdoc(loaders[plain]) or ""
        return {"name": f"{plain}:REFERENCE", "summary": doc, "predict": f"segbatch predict {plain}:... PHOTOS MASKS"}
    spec = compose.source(name).describe()
    return {
        "name": spec.name,
        "task": spec.task,
        "output": spec.output,
        "input": {k: v for k, v in dataclasses.asdict(spec.input).items() if v is not None},
        "classes": [c.name for c in spec.classes.classes],
        "licence": spec.licence,
        "source": spec.source,
        "digest": spec.digest,
        "predict": f"segbatch predict {spec.name} PHOTOS MASKS",
    }


def _form(card: "Card") -> str:
    size = f"{card.parameters:,} parameters at {card.classes} classes"
    return f"{card.form or 'as it is'}: {size}, {card.images_per_s:g} images/s at {card.width}x{card.height}"


def _options_of(config: type[Any]) -> dict[str, str]:
    """Name and default of every option."""
    return {n: str(f.default) for n, f in config.model_fields.items() if n != "kind"}


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of ``doctor``."""

    name: str
    good: bool
    found: str


def doctor(out: str = "") -> list[Check]:
    """Check versions, the processor, and whether ``out`` can be written with put-if-absent."""
    import importlib.metadata
    import os
    import shutil
    import sys
    import tempfile

    checks = [Check("python", sys.version_info >= (3, 11), sys.version.split()[0])]
    for name in ("ray", "torch", "pyarrow", "numba", "duckdb", "prefect"):
        checks.append(Check(name, True, importlib.metadata.version(name)))
    for extra, name in (("litert", "ai-edge-litert"), ("pretrained", "timm")):
        try:
            checks.append(Check(f"extra {extra}", True, f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(f"extra {extra}", True, f"not installed; pip install 'segbatch[{extra}]'"))
    checks.append(Check("cpus", True, str(os.cpu_count())))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    checks.append(Check("free space for temporary files", free > 2 << 30, f"{free / 1e9:.1f} GB"))
    checks += [Check(scheme, True, found) for scheme, found in storage.drivers().items()]
    if out:
        try:
            weakness = storage.check_writable(storage.resolve(out), keep=False).weakness
            checks.append(Check(f"put-if-absent in {out}", not weakness, weakness or "one of two writers wins"))
        except SegbatchError as error:
            checks.append(Check(f"put-if-absent in {out}", False, str(error)))
    return checks
