"""Several verbs in one go: ``segbatch run`` and ``segbatch demo``. Every stage resumes by itself."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from segbatch import api, storage, tables
from segbatch.config import Config, EngineConfig, PlanConfig, RunOptions, apply_sets, parse, read_toml
from segbatch.errors import ConfigError
from segbatch.inference.options import InferenceOptions
from segbatch.jobs import Limits, RunResult, Silent, Watch

if TYPE_CHECKING:
    import pyarrow as pa

    from segbatch.metrics.base import MetricOptions
    from segbatch.stages.totals import Analysis
    from segbatch.training import TrainConfig


class IngestStage(Config):
    """What ``segbatch ingest`` is told."""

    dataset: str
    source: str
    split: tuple[str, ...] = ()
    by_reference: bool = False
    max_bad_fraction: float = 0.0


class PredictStage(Config):
    """What ``segbatch predict`` is told; an empty ``model`` is the one that ``[train]`` makes."""

    model: str = ""
    classes: str = ""
    where: str = ""
    limit: int = Field(default=0, ge=0)
    batch_size: int = Field(default=0, ge=0)
    max_bad_fraction: float = 0.0
    inference: InferenceOptions = InferenceOptions()


class EvaluateStage(Config):
    """What ``segbatch evaluate`` is told; ``class_map`` holds the classes themselves, not a file."""

    protocol: str = ""
    missing: Literal["error", "skip"] = "error"
    slices: tuple[str, ...] = ()
    bootstrap: int = Field(default=0, ge=0)
    bootstrap_by: Literal["group", "image"] = "group"
    seed: int = Field(default=0, ge=0)
    class_map: dict[str, str] = Field(default_factory=dict)
    iou: tuple[float, ...] = ()
    max_detections: tuple[int, ...] = ()
    boundary: float | None = None
    upstream_bugs: bool = False

    @property
    def metric(self) -> "MetricOptions":
        """What the protocol leaves to its caller."""
        from segbatch.metrics.base import MetricOptions

        return MetricOptions(self.iou, self.max_detections, self.boundary, self.upstream_bugs)

    @property
    def analysis(self) -> "Analysis":
        """Slices and intervals."""
        from segbatch.stages.totals import Analysis

        return Analysis(self.slices, self.bootstrap, self.seed, self.bootstrap_by)


class ReportStage(Config):
    """What ``segbatch report`` is told."""

    worst: int = Field(default=20, ge=0)


class PipelineConfig(Config):
    """The file of ``segbatch run``.

    Attributes:
        out: root of all outputs: ``dataset/``, ``model/``, ``masks/``, ``metrics/``, ``report.html`` come below it.
        train: settings of ``segbatch train`` without ``out`` and ``samples``; no training when left out.
        plan, engine: as with ``--set``.
    """

    out: str
    ingest: IngestStage
    train: dict[str, Any] | None = None
    predict: PredictStage = PredictStage()
    evaluate: EvaluateStage = EvaluateStage()
    report: ReportStage = ReportStage()
    plan: PlanConfig = PlanConfig()
    engine: EngineConfig = EngineConfig()

    def place(self, name: str) -> str:
        """URI of one output."""
        return storage.join(storage.resolve(self.out), name)

    @property
    def options(self) -> RunOptions:
        """Shards and engine of every stage."""
        return RunOptions(plan=self.plan, engine=self.engine)

    def training(self) -> "TrainConfig | None":
        """The training's settings with its places filled in."""
        if self.train is None:
            return None
        from segbatch.training import TrainConfig

        places = {"out": self.place("model"), "samples": self.place("dataset")}
        return parse(TrainConfig, {**places, **self.train}, "[train]")


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """What a pipeline ended with: the evaluation, and the URI of the report."""

    evaluation: RunResult
    report: str


def load_pipeline(uri: str, sets: tuple[str, ...] = ()) -> PipelineConfig:
    """Read a pipeline file and validate all of it, the training's part included, before any work.

    Raises:
        ConfigError: see ``config.load_toml``; or neither a model to predict with nor a training.
    """
    config = parse(PipelineConfig, apply_sets(read_toml(uri), sets), uri)
    if config.train is None and not config.predict.model:
        raise ConfigError(f"{uri}: nothing to predict with", "give predict.model, or a [train] table")
    config.training()
    return config


def run_pipeline(config: PipelineConfig, watch: Watch | None = None) -> PipelineResult:
    """Ingest, train, predict, evaluate, report; what is done already is not done again."""
    watch = watch or Silent()
    ingest_stage(config, watch)
    train_stage(config, watch)
    predict_stage(config, watch)
    evaluation = evaluate_stage(config, watch)
    return PipelineResult(evaluation, report_stage(config))


def ingest_stage(config: PipelineConfig, watch: Watch) -> RunResult:
    """``segbatch ingest`` into ``out/dataset``."""
    stage = config.ingest
    return api.ingest(
        stage.dataset,
        stage.source,
        config.place("dataset"),
        split=stage.split,
        by_reference=stage.by_reference,
        limits=Limits(stage.max_bad_fraction),
        options=config.options,
        watch=watch,
    )


def train_stage(config: PipelineConfig, watch: Watch) -> str:
    """``segbatch train`` into ``out/model``, if there is a training; returns the model to predict with.

    A finished model is kept when the samples have changed since: whoever wants another one deletes it.
    """
    settings = config.training()
    if settings is not None:
        try:
            api.train(settings, watch)
        except ConfigError as error:
            from segbatch.training.state import SamplesChangedError

            if not isinstance(error, SamplesChangedError):
                raise
            watch.say(
                f"the samples have changed since {settings.out} was trained; it is kept "
                f"(to train anew, delete it and {config.place('masks')})"
            )
    return _model(config)


def _model(config: PipelineConfig) -> str:
    """The model to predict with: the given one, else the trained one."""
    settings = config.training()
    trained = f"{settings.model.kind}@{storage.resolve(settings.out)}" if settings is not None else ""
    return config.predict.model or trained


def predict_stage(config: PipelineConfig, watch: Watch) -> RunResult:
    """``segbatch predict`` into ``out/masks``."""
    stage = config.predict
    return api.predict(
        _model(config),
        config.place("dataset"),
        config.place("masks"),
        classes=stage.classes,
        batch_size=stage.batch_size,
        where=stage.where,
        limit=stage.limit,
        inference=stage.inference,
        limits=Limits(stage.max_bad_fraction),
        options=config.options,
        watch=watch,
    )


def evaluate_stage(config: PipelineConfig, watch: Watch) -> RunResult:
    """``segbatch evaluate`` into ``out/metrics``."""
    return api.evaluate(
        config.place("masks"),
        config.place("dataset"),
        config.place("metrics"),
        protocol=config.evaluate.protocol,
        metric=config.evaluate.metric,
        class_map=config.evaluate.class_map,
        analysis=config.evaluate.analysis,
        missing=config.evaluate.missing,
        options=config.options,
        watch=watch,
    )


def report_stage(config: PipelineConfig) -> str:
    """``segbatch report`` into ``out/report.html``."""
    return api.report(config.place("metrics"), config.place("report.html"), config.report.worst)


# -- the demo --------------------------------------------------------------------------------------------------------

DEMO_IMAGES = 300
DEMO_SQL = (
    "SELECT c.value AS label_id, round(100 * sum(c.pixels) / sum(sum(c.pixels)) OVER (), 1) AS percent, "
    "count(*) AS photos FROM masks, unnest(class_pixels) u(c) GROUP BY 1 ORDER BY 1"
)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What ``segbatch demo`` prints."""

    evaluation: RunResult
    report: str
    baseline_miou: float
    masks: str
    layout: str
    sql: str
    table: "pa.Table"

    @property
    def miou(self) -> float:
        """The U-Net's mean IoU."""
        return _miou(self.evaluation)


def demo(out: str, watch: Watch | None = None) -> DemoResult:
    """Draw shelves, then the whole line on them, and the same with a per-pixel colour classifier beside it."""
    from segbatch.datasets import drawn_shelves

    watch = watch or Silent()
    root = storage.resolve(out)
    photos = storage.join(root, "drawn")
    if not storage.exists(tables.service(photos, "drawn")):
        watch.say(f"drawing {DEMO_IMAGES} shelves into {photos}")
        drawn_shelves.draw(photos, DEMO_IMAGES)
        storage.create(tables.service(photos, "drawn"), b"")
    config = parse(PipelineConfig, _demo_config(root, photos), "demo")
    result = run_pipeline(config, watch)
    baseline = _baseline(config, watch)
    return DemoResult(
        evaluation=result.evaluation,
        report=result.report,
        baseline_miou=_miou(baseline),
        masks=config.place("masks"),
        layout=_layout(root),
        sql=DEMO_SQL,
        table=api.query(config.place("masks"), DEMO_SQL),
    )


def _demo_config(root: str, photos: str) -> dict[str, Any]:
    return {
        "out": root,
        "ingest": {"dataset": "image-masks", "source": photos},
        "train": {"split": "train", "val_split": "val", **_DEMO_TRAINING},
        "predict": {"where": "split = 'val'"},
        "evaluate": {"protocol": "semantic"},
    }


_DEMO_TRAINING: dict[str, Any] = {
    "model": {"kind": "unet", "width": 16, "depth": 4},
    "data": {"crop": [128, 160]},
    "optim": {"lr": 6e-3, "epochs": 7, "ema": 0.97},
}


def _baseline(config: PipelineConfig, watch: Watch) -> RunResult:
    """The colour classifier through the same verbs, in this process: it is too small for Ray."""
    below = {
        **config.model_dump(),
        "out": config.place("baseline"),
        "train": {"split": "train", "samples": config.place("dataset"), "model": {"kind": "color"}},
        "engine": {**config.engine.model_dump(), "kind": "inline"},
    }
    baseline = parse(PipelineConfig, below, "baseline")
    train_stage(baseline, watch)
    api.predict(
        f"color@{baseline.place('model')}",
        config.place("dataset"),
        baseline.place("masks"),
        where=config.predict.where,
        options=baseline.options,
        watch=watch,
    )
    return api.evaluate(
        baseline.place("masks"),
        config.place("dataset"),
        baseline.place("metrics"),
        protocol=config.evaluate.protocol,
        options=baseline.options,
        watch=watch,
    )


def _miou(result: RunResult) -> float:
    found = [f.value for f in result.figures if f.metric == "miou" and not f.class_name and not f.slice]
    return float(found[0]) if found and found[0] is not None else float("nan")


def _layout(root: str) -> str:
    """The folder's tables and files, with counts and sizes."""
    folders: dict[str, tuple[int, int]] = {}
    for info in storage.list_files(root):
        folder = storage.relative(info.uri, root).rpartition("/")[0]
        count, size = folders.get(folder, (0, 0))
        folders[folder] = (count + 1, size + info.size)
    lines = [f"{root}/"]
    for folder, (count, size) in sorted(folders.items()):
        lines.append(f"  {folder + '/' if folder else '.':28} {count:4} files {size / 1e6:8.2f} MB")
    return "\n".join(lines)
