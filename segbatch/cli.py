"""The command line: argument parsing and terminal output, nothing else."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from segbatch.errors import SegbatchError
from segbatch.version import __version__

if TYPE_CHECKING:
    from segbatch.config import RunOptions
    from segbatch.inference.options import InferenceOptions
    from segbatch.jobs import Limits, Resplit, RunResult
    from segbatch.runs import RunStatus

app = App(
    name="segbatch",
    version=__version__,
    help="Run, train and score segmentation models over whole datasets in object storage.",
    help_format="plaintext",
)

Sets = Annotated[
    tuple[str, ...], Parameter(name="--set", negative=(), help="Change a setting: key=value, e.g. plan.shard_rows=100.")
]
TrainSets = Annotated[
    tuple[str, ...], Parameter(name="--set", negative=(), help="Change a setting: key=value, e.g. optim.epochs=20.")
]
PipelineSets = Annotated[
    tuple[str, ...], Parameter(name="--set", negative=(), help="Change a setting: key=value, e.g. engine.actors=4.")
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="One JSON document on stdout; words go to stderr.")]
DryRun = Annotated[
    bool, Parameter(name="--dry-run", negative=(), help="Validate, say what would be done, write nothing.")
]
EngineName = Annotated[Literal["auto", "ray", "inline"], Parameter(name="--engine", help="Where shards are worked on.")]
MaxBad = Annotated[float, Parameter(name="--max-bad-fraction", help="Exit with 3 when more of the images are bad.")]
FailFast = Annotated[bool, Parameter(name="--fail-fast", negative=(), help="Stop at the first bad image.")]


@dataclass(frozen=True)
class _Views:
    """How the model is used.

    Attributes:
        tile: Cut larger photos into tiles of so many pixels a side.
        overlap: Pixels that neighbouring tiles share.
        scales: Sizes to feed the photo in, separated by commas, e.g. .75,1,1.25; results are averaged.
        flip: Feed the photo mirrored as well.
        min_score: Drop detections below this score.
        nms: Of boxes of one class that overlap by more than this, keep the best.
        top_k: Keep at most so many detections an image.
        mask_threshold: Probability above which a pixel belongs to an object.
        stuff_area: Panoptic: smaller stuff segments become void.
        confidence: Write the probability of every pixel of a label map, too (about ten times the size).
    """

    tile: int = 0
    overlap: int = 128
    scales: str = "1"
    flip: Annotated[bool, Parameter(negative=())] = False
    min_score: float | None = None
    nms: float | None = None
    top_k: int | None = None
    mask_threshold: float | None = None
    stuff_area: int | None = None
    confidence: Annotated[bool, Parameter(negative=())] = False

    def options(self) -> "InferenceOptions":
        """As the API takes them."""
        from segbatch.config import parse
        from segbatch.inference.options import InferenceOptions

        said = {**asdict(self), "scales": self._scales()}
        said["nms_iou"] = said.pop("nms")
        return parse(InferenceOptions, said, "options")

    def _scales(self) -> tuple[float, ...]:
        try:
            return tuple(float(s) for s in self.scales.split(","))
        except ValueError:
            from segbatch.errors import ConfigError

            raise ConfigError(f"--scales {self.scales} is not numbers separated by commas", "e.g. .75,1,1.25") from None


@app.command
def ingest(
    dataset: str,
    source: str,
    out: str,
    *,
    split: Annotated[tuple[str, ...], Parameter(name="--split", negative=())] = (),
    by_reference: Annotated[bool, Parameter(negative=())] = False,
    split_by: str = "",
    fractions: str = ".8,.1,.1",
    strict: Annotated[bool, Parameter(negative=())] = False,
    max_bad_fraction: MaxBad = 0.0,
    fail_fast: FailFast = False,
    engine: EngineName = "auto",
    set_: Sets = (),
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Read a dataset in its official layout into a samples table.

    Args:
        dataset: Name from `segbatch datasets`, or auto.
        source: Root folder or URL of the dataset.
        out: Run root to write.
        split: Read only this split; may be given more than once.
        by_reference: Keep only the images' addresses, not their bytes.
        split_by: hash:group_id or hash:sample_id, for splits of your own that hold when data are added.
        fractions: Shares of train, val and test for --split-by.
        strict: Stop at the first bad image or doubtful annotation.
    """
    from segbatch import api

    options = _options(set_, engine)
    choice: dict[str, Any] = {
        "split": split,
        "by_reference": by_reference,
        "resplit": _resplit(split_by, fractions),
        "options": options,
    }
    if dry_run:
        _show_preview(api.preview_ingest(dataset, source, out, **choice), json_)
        return
    limits, watch = _limits(max_bad_fraction, fail_fast, strict), _Terminal()
    with _bad_runs_shown(json_):
        result = api.ingest(dataset, source, out, limits=limits, watch=watch, **choice)
    _show_run(result, json_, f'segbatch query {out} "SELECT split, count(*) FROM samples GROUP BY 1"')


@app.command
def predict(
    model: str,
    input: str,
    out: str,
    *,
    also: Annotated[tuple[str, ...], Parameter(name="--also", negative=())] = (),
    classes: str = "",
    batch_size: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    min_agreement: float = 0.99,
    where: str = "",
    limit: int = 0,
    max_pixels: int = 200_000_000,
    views: Annotated[_Views, Parameter(name="*")] = _Views(),
    max_bad_fraction: MaxBad = 0.0,
    fail_fast: FailFast = False,
    engine: EngineName = "auto",
    set_: Sets = (),
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Run a model over a samples table, a folder, a glob or a list of images; writes a masks table.

    Args:
        model: loader:reference, or name@checkpoint for a trained built-in model; see `segbatch models`. Several,
            joined by +, are averaged; cascade:DETECTOR,SEGMENTER runs the second on what the first finds.
        input: Run root of samples, folder, glob, or text file with an address per line.
        out: Run root to write.
        also: Another model for the same pass, as ALIAS=MODEL; may be given more than once. MODEL is then ALIAS=MODEL,
            too, every photo is decoded once, and each model has its own run root OUT/ALIAS.
        classes: File that names the model's classes, where the model itself does not.
        batch_size: Photos per call of the model.
        dtype: Number format that the model computes in. auto measures, on some of the photos, which is fastest and
            still agrees with float32; fewer than 64 photos are done in float32. float16 is for GPUs.
            `--set inference.engine=` chooses between eager, openvino, inductor and cudagraphs.
        min_agreement: Smallest share of pixels on which a faster way of computing must agree with float32.
        where: SQL condition over the columns of the samples table.
        limit: Take only the first so many images.
        max_pixels: Larger photos are bad rows.
    """
    from segbatch import api

    said = [f"inference.dtype={dtype}"] if dtype != "auto" else []
    said += [f"inference.min_agreement={min_agreement}"] if min_agreement != 0.99 else []
    options = _options((*said, *set_), engine)
    choice: dict[str, Any] = {
        "classes": classes,
        "where": where,
        "limit": limit,
        "max_pixels": max_pixels,
        "inference": views.options(),
        "options": options,
    }
    models = _by_alias([model, *also]) if also else {}
    if dry_run:
        if models:
            from segbatch.errors import ConfigError

            raise ConfigError("--dry-run looks at one model", "leave out --also")
        _show_preview(api.preview_predict(model, input, out, **choice), json_)
        return
    choice |= {"batch_size": _batch_size(batch_size), "limits": _limits(max_bad_fraction, fail_fast)}
    if models:
        with _bad_runs_shown(json_):
            results = api.predict_many(models, input, out, watch=_Terminal(), **choice)
        _show_runs(results, json_)
        return
    with _bad_runs_shown(json_):
        result = api.predict(model, input, out, watch=_Terminal(), **choice)
    _show_run(result, json_, f'segbatch query {out} "SELECT status, count(*) FROM masks GROUP BY 1"')


@app.command
def evaluate(
    masks: str,
    samples: str,
    out: str,
    *,
    protocol: str = "",
    iou: tuple[float, ...] = (),
    max_detections: tuple[int, ...] = (),
    boundary: float | None = None,
    upstream_bugs: Annotated[bool, Parameter(negative=())] = False,
    class_map: str = "",
    slice_: Annotated[tuple[str, ...], Parameter(name="--slice", negative=())] = (),
    bootstrap: int = 0,
    bootstrap_by: Literal["group", "image"] = "group",
    seed: int = 0,
    missing: Literal["error", "skip"] = "error",
    partial: Annotated[bool, Parameter(negative=())] = False,
    engine: EngineName = "auto",
    set_: Sets = (),
    json_: Json = False,
) -> None:
    """Score masks against samples by an official protocol; writes summary, images and confusion tables.

    Args:
        masks: Run root of the predictions.
        samples: Run root of the ground truth.
        out: Run root to write.
        protocol: Name from `segbatch metrics`; the dataset's own when left out.
        iou: IoU from which on a detection may match; repeat it for several. The official ones when left out.
        max_detections: The best so many detections of an image and class count; repeat it for several.
        boundary: Width of boundaries, as a part of the image's diagonal.
        upstream_bugs: Reproduce the known defects of the official evaluator.
        class_map: TOML file: under [classes] a line "class of the masks" = "class of the samples" for each whose names
            differ; "" for no class.
        slice_: Figures for every value of this, too: an attribute, `objects`, `object-size`, a column, or SQL over the
            samples; repeat it for several.
        bootstrap: Resamples for 95 % intervals; 1000 is usual.
        bootstrap_by: What is drawn: groups (videos, patients; images where there are none), or images.
        seed: Of the bootstrap.
        missing: What to do about images without a good prediction.
        partial: Score what a run that is still going has written so far.
    """
    from segbatch import api
    from segbatch.metrics.base import MetricOptions
    from segbatch.stages.totals import Analysis

    metric = MetricOptions(iou, max_detections, boundary, upstream_bugs)
    result = api.evaluate(
        masks,
        samples,
        out,
        protocol=protocol,
        metric=metric,
        class_map=api.load_class_map(class_map) if class_map else None,
        analysis=Analysis(slice_, bootstrap, seed, bootstrap_by),
        missing="partial" if partial else missing,
        options=_options(set_, engine),
        watch=_Terminal(),
    )
    if json_:
        _print_json({**_run_json(result), "figures": [_figure_json(f) for f in result.figures]})
        return
    _show_figures(result.figures)
    print(f"next: segbatch report {out} {out}/report.html")


@app.command
def export(
    format: str,
    masks: str,
    samples: str,
    out: str,
    *,
    missing: Literal["error", "skip"] = "error",
    set_: Sets = (),
    json_: Json = False,
) -> None:
    """Write masks in the form that an evaluation server or another tool takes.

    Args:
        format: Name from `segbatch formats`.
        masks: Run root of the predictions; the samples root itself exports the ground truth.
        samples: Run root of the samples.
        out: Folder to write.
        missing: What to do about bad rows.
    """
    from segbatch import api

    options = _options(set_, "auto")
    done = api.export(format, masks, samples, out, missing=missing, options=options, watch=_Terminal())
    if json_:
        _print_json(asdict(done))


@app.command(name="import")
def import_(
    format: str,
    files: str,
    samples: str,
    out: str,
    *,
    max_bad_fraction: MaxBad = 0.0,
    fail_fast: FailFast = False,
    engine: EngineName = "auto",
    set_: Sets = (),
    json_: Json = False,
) -> None:
    """Read other people's predictions into a masks table.

    Args:
        format: Name from `segbatch formats`.
        files: File, folder or archive that holds them.
        samples: Run root of the samples they were made for.
        out: Run root to write.
    """
    from segbatch import api

    limits, options = _limits(max_bad_fraction, fail_fast), _options(set_, engine)
    with _bad_runs_shown(json_):
        result = api.import_predictions(format, files, samples, out, limits=limits, options=options, watch=_Terminal())
    _show_run(result, json_, f"segbatch evaluate {out} {samples} METRICS")


@app.command
def compare(
    first: str,
    second: str,
    *,
    bootstrap: int = 1000,
    bootstrap_by: Literal["group", "image"] = "group",
    seed: int = 0,
    unpaired: Annotated[bool, Parameter(negative=())] = False,
    json_: Json = False,
) -> None:
    """Compare two evaluations: the difference of each figure with its 95 % interval.

    Args:
        first: Run root of an evaluation.
        second: Run root of another one, by the same protocol.
        bootstrap: Resamples for the intervals.
        bootstrap_by: What is drawn: groups (videos, patients; images where there are none), or images.
        seed: Of the bootstrap.
        unpaired: The two have other images; each is drawn on its own.
    """
    from segbatch import api

    found = api.compare(first, second, resamples=bootstrap, seed=seed, by=bootstrap_by, paired=not unpaired)
    if json_:
        _print_json([_figure_json(d) for d in found])
        return
    by_class = next((d.metric for d in found if d.class_name), "")
    rows = []
    for d in found:
        if not d.class_name or d.metric == by_class:
            better = "" if d.second_better is None else f"{d.second_better:.1%}"
            values = [_number(v) for v in (d.first, d.second, d.difference)]
            rows.append([d.metric, d.class_name, *values, _span(d), better])
    _show_rows(["figure", "class", "first", "second", "difference", "95 % interval", "second better"], rows)


@app.command
def report(metrics: str, out: str, *, worst: int = 20) -> None:
    """Write the page of an evaluation: figures, classes, confusion, worst images.

    Args:
        metrics: Run root of the evaluation.
        out: HTML file to write.
        worst: How many of the worst images to show.
    """
    from segbatch import api

    print(api.report(metrics, out, worst))


@app.command
def train(config: str, out: str = "", *, set_: TrainSets = (), json_: Json = False) -> None:
    """Train a model on a samples table; the same command resumes from the last checkpoint.

    Args:
        config: TOML file; see the README.
        out: Model folder to write; overrides the one in the file.
    """
    from segbatch import api

    settings = api.load_train_config(config, out, set_)
    result = api.train(settings, _Terminal())
    if json_:
        _print_json(asdict(result))
        return
    print(f"next: segbatch predict {result.reference} SAMPLES OUT")


@app.command
def run(config: str, *, set_: PipelineSets = (), json_: Json = False) -> None:
    """Ingest, train, predict, evaluate and report in one go; the same command resumes.

    Args:
        config: TOML file; see the README.
    """
    from segbatch import pipeline

    result = pipeline.run_pipeline(pipeline.load_pipeline(config, set_), _Terminal())
    if json_:
        _print_json({**_run_json(result.evaluation), "figures": [_figure_json(f) for f in result.evaluation.figures]})
        return
    _show_figures(result.evaluation.figures)
    print(f"report: {result.report}")


@app.command
def retry(
    out: str,
    *,
    failed: Annotated[bool, Parameter(negative=())] = False,
    max_bad_fraction: MaxBad = 0.0,
    engine: EngineName = "auto",
    set_: Sets = (),
    json_: Json = False,
) -> None:
    """Redo only the rows whose status is an error, in place.

    Args:
        out: Run root of a predict.
        failed: Redo the failed rows (the only choice so far; has to be said).
    """
    from segbatch import api
    from segbatch.errors import ConfigError

    if not failed:
        raise ConfigError("say what to retry", f"segbatch retry {out} --failed")
    limits, options = _limits(max_bad_fraction, False), _options(set_, engine)
    with _bad_runs_shown(json_):
        result = api.retry(out, limits=limits, options=options, watch=_Terminal())
    _show_run(result, json_, "")


@app.command
def status(out: str, *, watch: Annotated[bool, Parameter(negative=())] = False, json_: Json = False) -> None:
    """Say where a run stands and who is at work on it, from any machine.

    Args:
        out: Run root.
        watch: Say it again every ten seconds while somebody is at work.
    """
    from segbatch import api

    while True:
        found = api.status(out)
        if json_:
            live = {"complete": found.complete, "per_s": found.per_s, "eta_s": found.eta_s}
            _print_json({**asdict(found), **live})
        else:
            _show_status(found)
        if not watch or not found.is_live:
            return
        time.sleep(10)


def _show_status(found: "RunStatus") -> None:
    print(
        f"{found.root}: {found.rows_done} of {found.rows} rows, {found.shards_done} of {found.shards} shards, "
        f"{found.bad} bad"
    )
    for driver in found.drivers:
        said = f"{driver.phase}, {driver.rows} of {driver.total} images, {driver.per_s:.1f}/s"
        print(f"{driver.name}: {said if driver.alive else 'died'}; began {driver.started}")
        for place in driver.workers if driver.alive else ():
            print(f"  an actor {place}")
    if found.quarantined:
        names = ", ".join(sorted(found.quarantined)[:3])
        print(f"{len(found.quarantined)} images are quarantined, for example {names}")
    if found.is_live:
        print(f"{found.per_s:.1f} images/s" + (f", ETA {_duration(found.eta_s)}" if found.eta_s else ""))
    elif not found.complete:
        print("nobody is at work; the command that began it goes on where it stopped")


@app.command
def gc(
    *roots: str,
    keep_runs: int | None = None,
    incomplete: Annotated[bool, Parameter(negative=())] = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Remove what run roots hold that nobody needs, and the oldest of many runs. Runs in use are left alone.

    Args:
        roots: Run roots; with --keep-runs folders of run roots.
        keep_runs: Of each verb so many complete runs stay, the newest, and what they were made from.
        incomplete: Runs that were never finished may go, too.
    """
    from segbatch import api
    from segbatch.errors import ConfigError

    if not roots:
        raise ConfigError("say where to clean up", "segbatch gc OUT, or segbatch gc FOLDER --keep-runs 5")
    found = api.gc(roots, keep_runs=keep_runs, incomplete=incomplete, dry_run=dry_run)
    if json_:
        garbage = [{**asdict(g), "bytes": g.bytes, "files": [f.uri for f in g.files]} for g in found.garbage]
        _print_json({**asdict(found), "garbage": garbage, "dry_run": dry_run})
        return
    word = "would go" if dry_run else "removed"
    for entry in found.garbage:
        print(f"{word}: {entry.root}: {entry.what}, {len(entry.files)} files, {entry.bytes / 1e6:.3f} MB")
    for root, reason in found.kept.items():
        print(f"stays: {root}: {reason}")
    for root, drivers in found.busy.items():
        print(f"in use: {root}: {drivers[0].name}")
    size = sum(g.bytes for g in found.garbage)
    print(f"{word}: {sum(len(g.files) for g in found.garbage)} files, {size / 1e6:.3f} MB in all")


@app.command
def verify(out: str, *, set_: Sets = (), json_: Json = False) -> None:
    """Read every file of a run root again; name what is wrong and what to do, and exit with 1 if anything is.

    Args:
        out: Run root.
    """
    from segbatch import api

    found = api.verify(out, options=_options(set_, "auto"), watch=_Terminal())
    if json_:
        _print_json({**asdict(found), "good": found.is_good})
    else:
        size = f"{found.files} files, {found.rows} rows, {found.bytes / 1e6:.1f} MB"
        old = f"; {found.without_checksums} files are older than checksums" if found.without_checksums else ""
        print(f"{found.root}: {size}{old}: {'all good' if found.is_good else f'{len(found.problems)} problems'}")
        for problem in found.problems:
            print(f"{problem.uri}: {problem.said} ({problem.fix})")
    if not found.is_good:
        raise SystemExit(1)


@app.command
def compact(
    source: str, out: str, *, file_size: int = 256, engine: EngineName = "auto", set_: Sets = (), json_: Json = False
) -> None:
    """Copy a complete run into fewer, larger files of a new run root; the old one is not touched.

    Args:
        source: Run root to read.
        out: Run root to write.
        file_size: MB that a file may have; 128 to 512 suit object stores.
    """
    from segbatch import api

    options = _options(set_, engine)
    result = api.compact(source, out, file_bytes=file_size << 20, options=options, watch=_Terminal())
    _show_run(result, json_, f"segbatch verify {out}")


@app.command
def query(out: str, sql: str, *, json_: Json = False) -> None:
    """Run SQL over the tables of a run root; nothing else can be read or written.

    Args:
        out: Run root.
        sql: For example "SELECT status, count(*) FROM masks GROUP BY 1".
    """
    from segbatch import api

    found = api.query(out, sql)
    if json_:
        _print_json(found.to_pylist())
        return
    _show_rows(found.column_names, [[str(v) for v in row.values()] for row in found.to_pylist()])


@app.command
def models(name: str = "", *, json_: Json = False) -> None:
    """List what can stand as MODEL, or tell all of one.

    Args:
        name: An architecture (fcn), a loader (hf), or a reference as predict takes it (fcn@OUT).
    """
    from segbatch import api

    if not name:
        _show_catalogue("models", json_)
    elif json_:
        _print_json(api.describe_model(name))
    else:
        _show_document(api.describe_model(name))


@app.command
def datasets(*, json_: Json = False) -> None:
    """List what can stand as DATASET."""
    _show_catalogue("datasets", json_)


@app.command
def formats(*, json_: Json = False) -> None:
    """List what can stand as FORMAT."""
    _show_catalogue("formats", json_)


@app.command
def metrics(*, json_: Json = False) -> None:
    """List the evaluation protocols."""
    _show_catalogue("metrics", json_)


@app.command
def doctor(out: str = "", *, json_: Json = False) -> None:
    """Check this machine, and whether OUT can be written safely.

    Args:
        out: Run root or bucket to check.
    """
    from segbatch import api

    checks = api.doctor(out)
    if json_:
        _print_json([asdict(c) for c in checks])
    else:
        _show_rows(["check", "", "found"], [[c.name, "ok" if c.good else "BAD", c.found] for c in checks])
    if not all(c.good for c in checks):
        raise SystemExit(1)


@app.command
def demo(out: str = "demo-out") -> None:
    """Draw a small shelf dataset, train on it, predict, evaluate, report: the whole line in under four minutes.

    Args:
        out: Folder to write.
    """
    from segbatch import pipeline

    result = pipeline.demo(out, _Terminal())
    _show_figures(result.evaluation.figures, classes=False)
    print(
        f"mIoU {result.miou:.3f}; a per-pixel colour classifier reaches {result.baseline_miou:.3f} on the same images"
    )
    print("\n" + result.layout)
    print(f'\nsegbatch query {result.masks} "{result.sql}"')
    _show_rows(result.table.column_names, [[str(v) for v in row.values()] for row in result.table.to_pylist()])
    print(f"\nreport: {result.report}")


# -- terminal --------------------------------------------------------------------------------------------------------


class _Terminal:
    """``api.Watch`` on stderr: one bar in images where that is a terminal, a line per 30 s where not."""

    _LINE_EVERY_S = 30.0

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._what = self._unit = ""
        self._began = self._said = 0.0

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, soft_wrap=True, markup=False)

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        """Start the bar."""
        self._what, self._total, self._unit = what, total, unit
        self._began = self._said = time.monotonic()
        if not self._console.is_terminal:
            self.say(what if unit == "%" else f"{what}: {total} {unit}")
            return
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit + " {task.fields[rate]} {task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, rate="", note="")

    def advance(self, done: int, bad: int) -> None:
        """Move the bar, or print a line now and then."""
        seconds = time.monotonic() - self._began
        rate = done / seconds if seconds > 0 else 0.0
        speed = "" if self._unit == "%" else f"{rate:.1f}/s"
        note = f"{bad} bad" if bad else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=speed, note=note)
        elif time.monotonic() - self._said >= self._LINE_EVERY_S and done:
            self._said = time.monotonic()
            count = f"{done} %" if self._unit == "%" else f"{done} of {self._total} {self._unit}"
            left = f"ETA {_duration((self._total - done) / rate)}" if rate else ""
            self.say(", ".join(part for part in (f"{self._what}: {count}", speed, note, left) if part))

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _show_rows(header: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


@contextlib.contextmanager
def _bad_runs_shown(as_json: bool) -> Iterator[None]:
    """The JSON document of a run that ends with exit code 3; the words go to stderr as ever."""
    from segbatch.jobs import BadRunError

    try:
        yield
    except BadRunError as error:
        if as_json and error.result is not None:
            _print_json(_run_json(error.result))
        raise


def _show_run(result: "RunResult", as_json: bool, following: str) -> None:
    if as_json:
        _print_json(_run_json(result))
    elif following:
        print(f"{result.root}/{result.state.table}/part-*.parquet\nlook: {following}")


def _show_runs(results: "dict[str, RunResult]", as_json: bool) -> None:
    """Of several models, by their aliases."""
    if as_json:
        _print_json({alias: _run_json(result) for alias, result in results.items()})
        return
    for result in results.values():
        print(f"{result.root}/{result.state.table}/part-*.parquet")


def _by_alias(models: list[str]) -> dict[str, str]:
    """Models of one pass from ``ALIAS=MODEL``."""
    from segbatch.errors import ConfigError
    from segbatch.one_pass import check_aliases

    pairs = [text.partition("=") for text in models]
    for text, (_, _, reference) in zip(models, pairs, strict=True):
        if not reference or ":" in text.partition("=")[0] or "@" in text.partition("=")[0]:
            raise ConfigError(f"model {text} has no alias", "with --also, give every model as ALIAS=MODEL")
    check_aliases(alias for alias, _, _ in pairs)
    return {alias: reference for alias, _, reference in pairs}


def _show_preview(preview: Any, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(preview))
        return
    print(f"new: {preview.rows} images ({preview.bytes / 1e6:.1f} MB) in {preview.shards} shards")
    print(f"changed: {preview.changed}, gone: {preview.gone}; {preview.rewrites} shards would be made again for them")
    print(f"planned already: {preview.planned_rows} images; nothing was written")


_CLASS_COLUMNS = 6
"""Figures by class that fit a terminal; every protocol names its most important ones first."""


def _show_figures(figures: Any, classes: bool = True) -> None:
    overall = [f for f in figures if not f.class_name and not f.slice]
    spans = any(f.ci_low is not None for f in overall)
    rows = [[f.metric, _number(f.value, f.metric), *([_span(f)] if spans else [])] for f in overall]
    _show_rows(["figure", "value", *(["95 % interval"] if spans else [])], rows)
    _show_parts([f for f in figures if f.slice and not f.class_name], "slice")
    if classes:
        _show_parts([f for f in figures if f.class_name and not f.slice], "class")


def _show_parts(figures: Any, what: Literal["slice", "class"]) -> None:
    """The first figures of every slice or class, one row each."""
    found = list(dict.fromkeys(f.metric for f in figures))
    columns = ["support", *found[:_CLASS_COLUMNS]]
    rows: dict[str, dict[str, str]] = {}
    for f in figures:
        name = f.slice if what == "slice" else f.class_name
        cells = rows.setdefault(name, {"support": "" if f.support is None else f"{f.support:,}"})
        cells[f.metric] = _number(f.value)
    if rows:
        _show_rows([what, *columns], [[name, *(cells.get(c, "") for c in columns)] for name, cells in rows.items()])
    if len(found) > _CLASS_COLUMNS:
        print(f"{len(found) - _CLASS_COLUMNS} more figures by {what} are in the summary table")


def _span(figure: Any) -> str:
    return "" if figure.ci_low is None else f"{figure.ci_low:.4f} - {figure.ci_high:.4f}"


def _number(value: float | None, metric: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if metric.startswith("images_") else f"{value:.4f}"


def _show_catalogue(family: Literal["models", "datasets", "metrics", "formats"], as_json: bool) -> None:
    from segbatch import api

    entries = api.catalogue(family)
    if as_json:
        _print_json(entries)
        return
    titles = {"name": "name", "task": "task", "form": "form", "parameters": "parameters", "images_per_s": "images/s"}
    shown = [k for k in (*titles, "input", "licence", "summary") if k in entries[0]]
    header = [titles.get(k, "what it is" if k == "summary" else k) for k in shown]
    rows = [[e[k] for k in shown] for e in entries]
    said = [r[-1] for r in rows]
    _show_rows(header, [[*r[:-1], "" if n and said[n - 1] == r[-1] else r[-1]] for n, r in enumerate(rows)])


def _show_document(document: dict[str, Any]) -> None:
    """Key and value a line; lists and tables indented below their key."""
    for key, value in document.items():
        if isinstance(value, dict):
            value = [f"{k} = {v}" for k, v in value.items()]
        if isinstance(value, list):
            print(f"{key}:", *(f"  {v}" for v in value), sep="\n")
        else:
            print(f"{key}: {value}")


def _run_json(result: "RunResult") -> dict[str, Any]:
    seconds = {"seconds": round(result.seconds, 3), "start_seconds": round(result.start_seconds, 3)}
    counts = {"rows_now": result.rows, "rows_copied": result.copied}
    return {**asdict(result.state), **counts, **seconds, "record": dict(result.record)}


def _figure_json(figure: Any) -> dict[str, Any]:
    data = asdict(figure)
    data["class"] = data.pop("class_name")
    return data


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, default=str))


# -- arguments -------------------------------------------------------------------------------------------------------


def _options(sets: tuple[str, ...], engine: str) -> "RunOptions":
    from segbatch.config import RunOptions, apply_sets, parse

    kind = [f"engine.kind={engine}"] if engine != "auto" else []
    return parse(RunOptions, apply_sets({}, [*kind, *sets]), "--set")


def _limits(max_bad_fraction: float, fail_fast: bool, strict: bool = False) -> "Limits":
    from segbatch.jobs import Limits

    return Limits(max_bad_fraction, fail_fast, strict)


def _resplit(split_by: str, fractions: str) -> "Resplit":
    from segbatch.errors import ConfigError
    from segbatch.jobs import Resplit

    if split_by and not split_by.startswith("hash:"):
        raise ConfigError(f"--split-by {split_by} is not known", "hash:group_id or hash:sample_id")
    try:
        shares = tuple(float(f) for f in fractions.split(","))
    except ValueError as error:
        raise ConfigError(f"--fractions {fractions} are not numbers", "e.g. .8,.1,.1") from error
    return Resplit(split_by.removeprefix("hash:"), shares)


def _batch_size(text: str) -> int:
    from segbatch.errors import ConfigError

    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--batch-size {text} is neither auto nor a positive number")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; user errors are one line on stderr and an exit code, without traceback."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        verb = " ".join(error.command_chain or ())
        _fail(f"{' '.join(str(error).split())} (see: {' '.join(['segbatch', verb, '--help']).replace('  ', ' ')})", 2)
    except SegbatchError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 1)
    except BrokenPipeError:
        os._exit(1)


def _fail(error: object, code: int) -> None:
    if os.environ.get("SEGBATCH_DEBUG"):
        raise
    print(f"segbatch: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
