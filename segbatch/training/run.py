"""``train``: from a training file to a checkpoint folder."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from segbatch import storage
from segbatch.config import digest_of
from segbatch.errors import ConfigError, StoppedError
from segbatch.models import checkpoint
from segbatch.models.architectures import ARCHITECTURES, Architecture
from segbatch.models.base import InputSpec, ModelSpec
from segbatch.models.color import ColorTable
from segbatch.training import state
from segbatch.training.config import TrainConfig
from segbatch.training.network import NetworkTraining
from segbatch.training.result import TrainProgress, TrainResult
from segbatch.training.samples import SampleSet
from segbatch.training.validation import validate

if TYPE_CHECKING:
    from collections.abc import Iterator

Report = Callable[[TrainProgress], None]


def train(
    config: TrainConfig, on_progress: Report | None = None, should_stop: Callable[[], bool] | None = None
) -> TrainResult:
    """Train a model on a samples table and write its checkpoint folder ``config.out``.

    An interrupted training goes on from its last checkpoint when it is called again; a finished one returns at once.
    With ``optim.epochs`` and the same number of threads, the result is the same bit by bit, interrupted or not.

    Args:
        config: the training file.
        on_progress: called after every step.
        should_stop: asked after every step; True writes a checkpoint and ends.

    Raises:
        ConfigError: no such samples, classes that cannot be learned, CT slices for a network that sees photos or the
            other way round, another training in the same folder, a broken checkpoint; see ``state.claim``.
        DataError: a sample without labels of the network's task, or broken; named.
        EngineError: the loss is not a number.
        StoppedError: ``should_stop`` said so.
    """
    out = storage.resolve(config.out)
    architecture = ARCHITECTURES[config.model.kind]
    spec = architecture.input_spec(config.model)
    samples = _training_samples(config, architecture, spec.slices)
    held_out = _validation_samples(config, samples, spec.slices)
    content = {
        "train": config.deciding(),
        "samples": samples.digest,
        "val_samples": held_out.digest if held_out else None,
        "classes": samples.classes.to_json(),
    }
    state.claim(out, content)
    if storage.exists(storage.join(out, checkpoint.MODEL_FILE)):
        return _recorded(out, config)
    run = _Run(config, out, spec, samples, held_out, digest_of(content))
    with _torch_settings(config.threads, config.seed):
        fit = run.color if config.model.kind == "color" else run.network
        return fit(on_progress or (lambda _: None), should_stop or (lambda: False))


def _training_samples(config: TrainConfig, architecture: Architecture, slices: int) -> SampleSet:
    """The labels of the network's task, and things for ``data.border_weight``."""
    borders = config.data.border_weight > 0
    if borders and (architecture.task != "semantic" or architecture.output == "labels"):
        raise ConfigError(
            f"data.border_weight is for the loss of semantic networks, which {config.model.kind} has not",
            "leave it out",
        )
    found = SampleSet(config.samples, config.split, config.data.cache_mb, architecture.task, borders, slices)
    if borders and not any(c.isthing for c in found.classes.classes):
        raise ConfigError(
            f"data.border_weight: no class of {config.samples} is a thing, so there are no objects to keep apart",
            "mark the classes that are counted with isthing in the class table",
        )
    return found


def _validation_samples(config: TrainConfig, samples: SampleSet, slices: int) -> SampleSet | None:
    if not config.validates:
        return None
    root = config.val_samples or config.samples
    found = SampleSet(root, config.val_split, config.data.cache_mb, samples.task, slices=slices)
    ours, theirs = ([c.label_id for c in s.classes.classes] for s in (samples, found))
    if ours != theirs:
        raise ConfigError(
            f"training and validation samples have other classes: label ids {ours[:9]} and {theirs[:9]}",
            "ingest both with one class table",
        )
    return found


@contextmanager
def _torch_settings(threads: int, seed: int) -> "Iterator[None]":
    """Threads and random numbers of torch, as they were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One call of ``train``."""

    def __init__(
        self,
        config: TrainConfig,
        out: str,
        spec: InputSpec,
        samples: SampleSet,
        held_out: SampleSet | None,
        digest: str,
    ) -> None:
        self._config = config
        self._out = out
        self._samples = samples
        self._held_out = held_out
        self._digest = digest
        self._architecture = ARCHITECTURES[config.model.kind]
        self._input = spec

    def network(self, report: Report, should_stop: Callable[[], bool]) -> TrainResult:
        """Gradient descent."""
        model = self._config.model
        net = self._architecture.build(model, self._samples.classes)
        self._architecture.begin(net, model)
        training = NetworkTraining(
            self._config, self._architecture, net, self._input, self._samples, self._out, self._digest
        )
        begun = training.resume()
        self._samples.preload()
        training.run(report, should_stop, self._validate if self._held_out else None)
        training.settle()
        figures = self._validate(net)
        training.log.add(step=training.step, cpu_s=round(training.clock.seconds, 2), **figures)
        record = {"steps": training.step, "loss": training.loss, "cpu_s": training.clock.seconds, **figures}
        return self._finish(net, record, training.log, begun)

    def color(self, report: Report, should_stop: Callable[[], bool]) -> TrainResult:
        """Counting colours: one pass, repeated as a whole after an interruption."""
        clock, log = state.CpuClock(), state.Log(storage.join(self._out, "log.jsonl"))
        table = self._architecture.build(self._config.model, self._samples.classes)
        assert isinstance(table, ColorTable)
        for index in range(len(self._samples)):
            found = self._samples.get(index)
            assert found.classes is not None
            table.observe(found.image, found.classes)
            done = index + 1
            report(TrainProgress(done, done / len(self._samples), 0.0, 0.0, done, clock.seconds))
            if should_stop() and done < len(self._samples):
                raise StoppedError(f"training stopped after {done} photos", "the same command begins anew")
        table.settle()
        figures = self._validate(table)
        log.add(step=len(self._samples), cpu_s=round(clock.seconds, 2), **figures)
        record = {"steps": len(self._samples), "loss": None, "cpu_s": clock.seconds, **figures}
        return self._finish(table, record, log, 0)

    def _validate(self, net: nn.Module) -> dict[str, Any]:
        """Figures of the validation photos; empty without any."""
        if self._held_out is None:
            return {}
        spec = ModelSpec(
            name=self._config.model.kind,
            task=self._architecture.task,
            classes=self._samples.classes,
            input=self._input,
            output=self._architecture.output,
            digest="",
            choice=self._config.val_inference.choice(self._architecture.choice),
        )
        return validate(self._architecture.segmenter(net, spec), self._held_out)

    def _finish(self, net: nn.Module, record: dict[str, Any], log: state.Log, begun: int) -> TrainResult:
        """Write the checkpoint folder; ``model.json`` comes last and says that the training is finished."""
        config = self._config
        log.save()
        training = {
            **record,
            "samples": len(self._samples),
            "skipped": dict(self._samples.skipped),
            "data": self._samples.digest,
            "config": config.deciding(),
        }
        checkpoint.write(self._out, net, config.model.kind, config.model, self._samples.classes, training)
        storage.delete(state.last(self._out))
        return _result(self._out, config, training, begun)


def _recorded(out: str, config: TrainConfig) -> TrainResult:
    """The result of a training that is finished."""
    training = checkpoint.read(out).file.training
    return _result(out, config, training, int(training["steps"]))


def _result(out: str, config: TrainConfig, training: dict[str, Any], begun: int) -> TrainResult:
    return TrainResult(
        uri=out,
        reference=f"{config.model.kind}@{out}",
        steps=int(training["steps"]),
        samples=int(training["samples"]),
        skipped=training["skipped"],
        loss=training["loss"],
        cpu_s=float(training["cpu_s"]),
        resumed_from=begun,
        **{name: value for name, value in training.items() if name.startswith("val_")},
    )
