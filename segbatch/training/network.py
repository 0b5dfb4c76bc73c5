"""The training loop of a network: AdamW, polynomial schedule, averaged weights, checkpoints."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from segbatch.errors import ConfigError, EngineError, StoppedError
from segbatch.inference.pipeline import fed_size
from segbatch.models.architectures import Architecture
from segbatch.models.base import InputSpec
from segbatch.models.checkpoint import load_state
from segbatch.training import losses, precision, state
from segbatch.training.averaging import Average, settle_batch_norm
from segbatch.training.config import TrainConfig
from segbatch.training.crops import Batch, CropStream
from segbatch.training.result import TrainProgress
from segbatch.training.samples import SampleSet

POWER = 0.9
"""Of the polynomial learning-rate schedule."""

_LOG_EVERY = 10
_NORM_BATCHES = 32
_LARGEST_CROP = 512

Validate = Callable[[nn.Module], dict[str, Any]]
Report = Callable[[TrainProgress], None]


def crop_size(config: TrainConfig, spec: InputSpec, samples: SampleSet) -> tuple[int, int]:
    """(height, width) of the training crops; see ``DataConfig.crop``.

    Raises:
        ConfigError: a crop that the network cannot take.
    """
    divisor = spec.divisor
    if config.data.crop:
        wrong = [s for s in config.data.crop if s % divisor]
        if wrong:
            near = max(round(wrong[0] / divisor), 1) * divisor
            raise ConfigError(
                f"data.crop = {list(config.data.crop)}: {wrong[0]} is no multiple of {divisor}", f"take {near}"
            )
        return config.data.crop
    height, width = fed_size(spec, *samples.smallest)
    if spec.height and spec.width:
        height, width = spec.height, spec.width
    rounded = [max(-(-min(s, _LARGEST_CROP) // divisor), 1) * divisor for s in (height, width)]
    return rounded[0], rounded[1]


class NetworkTraining:
    """A network in training.

    Args:
        config: the training file, with an end (epochs or minutes).
        architecture: of the network; its loss, where it predicts instances or panoptic segments.
        net: with its first weights.
        spec: what it is fed.
        samples: to train on.
        out: the output folder.
        digest: of all that decides the result.
    """

    def __init__(
        self,
        config: TrainConfig,
        architecture: Architecture,
        net: nn.Module,
        spec: InputSpec,
        samples: SampleSet,
        out: str,
        digest: str,
    ) -> None:
        self._architecture = architecture
        self.net = net.to(memory_format=torch.channels_last)
        self.step = 0
        self.clock = state.CpuClock()
        self.log = state.Log(f"{out}/log.jsonl")
        self._optim = config.optim
        self._save_every_s = config.checkpoint_every_s
        self._validate_every = config.val_every_epochs
        self._out, self._digest = out, digest
        self._samples = samples
        size = crop_size(config, spec, samples)
        self._stream, self._settling = (CropStream(samples, config.data, spec, size, config.seed) for _ in range(2))
        self._dtype = precision.resolve(config.optim.dtype)
        precision.keep_depthwise_float32(net)
        self._average = Average(net, config.optim.ema)
        self._optimizer = torch.optim.AdamW(_groups(net, config), lr=config.optim.lr)
        self._weights = self._class_weights()
        self._losses: list[float] = []
        self._saved_at = time.monotonic()

    def _class_weights(self) -> torch.Tensor:
        if self._optim.class_weights == "none":
            return torch.ones(len(self._samples.pixels))
        return torch.from_numpy(losses.sqrt_median_weights(self._samples.pixels, self._samples.pixels_where_present))

    @property
    def fraction(self) -> float:
        """How much of the training is done, 0..1."""
        optim = self._optim
        done = 0.0
        if optim.epochs:
            done = self.step / math.ceil(optim.epochs * len(self._samples) / optim.batch_size)
        if optim.max_minutes:
            done = max(done, self.clock.seconds / (60 * optim.max_minutes))
        return min(done, 1.0)

    @property
    def loss(self) -> float | None:
        """Mean training loss over the last steps."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; returns its step.

        Raises:
            ConfigError: a broken or foreign checkpoint.
        """
        found = state.load(self._out, self._digest)
        if found is None:
            return 0
        load_state(self.net, found["net"], state.last(self._out))
        self._average.load(found["average"])
        self._optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(found["rng"])
        self.clock.restart(found["cpu_s"])
        self.log.lines, self._losses = list(found["log"]), list(found["losses"])
        self.step = int(found["step"])
        return self.step

    def save(self) -> None:
        """Write the checkpoint and the log."""
        state.save(
            self._out,
            {
                "digest": self._digest,
                "step": self.step,
                "cpu_s": self.clock.seconds,
                "net": self.net.state_dict(),
                "average": self._average.values,
                "optimizer": self._optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "log": self.log.lines,
                "losses": self._losses,
            },
        )
        self.log.save()
        self._saved_at = time.monotonic()

    def run(self, report: Report, should_stop: Callable[[], bool], validate: Validate | None) -> None:
        """Train to the end.

        Raises:
            StoppedError: ``should_stop`` said so; a checkpoint was written.
            EngineError: the loss is not a number; the last checkpoint is from before.
            DataError: a broken sample, named.
        """
        self.net.train()
        with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
            size = self._optim.batch_size
            coming = pool.submit(self._stream.batch, self.step * size, size)
            while self.fraction < 1.0:
                batch = coming.result()
                coming = pool.submit(self._stream.batch, (self.step + 1) * size, size)
                self._after(report, self._train_on(batch))
                if validate and self._validate_every and self._epoch_ended(self._validate_every):
                    self._try_out(validate)
                stop = should_stop()
                if stop or time.monotonic() - self._saved_at >= self._save_every_s:
                    self.save()
                if stop and self.fraction < 1.0:
                    raise StoppedError(f"training stopped after {self.step} steps", "the same command goes on")
        self.save()

    def settle(self) -> None:
        """Put the averaged weights into the network, with batch normalisation to match."""
        if self._optim.ema:
            self._average.put_into(self.net)
            size = self._optim.batch_size
            batches = (self._settling.batch(k * size, size) for k in range(_NORM_BATCHES))
            settle_batch_norm(self.net, self._run, batches)
        self.net.eval()

    def _epoch_ended(self, every: int) -> bool:
        images, span = self.step * self._optim.batch_size, every * len(self._samples)
        return images // span > (images - self._optim.batch_size) // span

    def _try_out(self, validate: Validate) -> None:
        """Validate with the averaged weights, then go on with the present ones."""
        present = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.settle()
        self.log.add(step=self.step, cpu_s=round(self.clock.seconds, 2), **validate(self.net))
        self.net.load_state_dict(present)
        self.net.train()

    def _train_on(self, batch: Batch) -> float:
        """One step; returns the learning rate."""
        rate = (1 - self.fraction) ** POWER
        if self._optim.warmup_steps:
            rate *= min(1.0, (self.step + 1) / self._optim.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._optim.lr * rate * group["scale"]
        loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EngineError(
                f"the loss is {value} at step {self.step + 1} (learning rate {self._optim.lr * rate:.3g})",
                'train into another OUT with a lower optim.lr, or with optim.dtype = "float32"',
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.step += 1
        self._average.update(self.net, self.step)
        self._losses = [*self._losses[1 - _LOG_EVERY :], value]
        return float(self._optim.lr * rate)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """What the step makes smaller."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            if batch.targets:
                return self._architecture.loss(self.net, _tensor(batch), batch.targets, self.step)
            logits = self.net(_tensor(batch))
        assert batch.classes is not None
        stride = batch.classes.shape[1] // logits.shape[2]
        classes = _at_stride(torch.from_numpy(batch.classes), stride, self.step).long()
        borders = None
        if batch.borders is not None:
            borders = _at_stride(torch.from_numpy(batch.borders), stride, self.step)
        return losses.cross_entropy(logits, classes, self._weights, borders)

    def _run(self, batch: Batch) -> None:
        """Send a batch through the network in float32."""
        if batch.targets:
            self._architecture.loss(self.net, _tensor(batch), batch.targets, 0)
        else:
            self.net(_tensor(batch))

    def _after(self, report: Report, lr: float) -> None:
        """Log and report a step."""
        progress = TrainProgress(
            step=self.step,
            fraction=self.fraction,
            loss=self.loss or 0.0,
            lr=lr,
            images=self.step * self._optim.batch_size,
            cpu_s=self.clock.seconds,
        )
        if self.step % _LOG_EVERY == 0:
            self.log.add(
                step=progress.step,
                loss=round(progress.loss, 6),
                lr=lr,
                images=progress.images,
                cpu_s=round(progress.cpu_s, 2),
            )
        report(progress)


def _tensor(batch: Batch) -> torch.Tensor:
    """(n, channels, h, w), channels last in memory."""
    return torch.from_numpy(batch.images).permute(0, 3, 1, 2)


def _at_stride(pixels: torch.Tensor, stride: int, step: int) -> torch.Tensor:
    """The pixels (n, h, w) that lie on the logits' grid: one of each cell, another one at every step.

    Cheaper than up-sampling the logits (a fifth of a training step at stride 2), and every pixel takes its turn.
    """
    down, right = divmod(step % (stride * stride), stride)
    return pixels[:, down::stride, right::stride]


def _groups(net: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups: a pretrained encoder is slower; vectors (normalisation, biases) have no weight decay."""
    model = config.model
    foreign = model.kind == "unet" and bool(model.encoder) and model.pretrained
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        groups.setdefault((foreign and name.startswith("encoder."), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "scale": config.optim.encoder_lr_scale if slow else 1.0,
            "weight_decay": config.optim.weight_decay if decays else 0.0,
        }
        for (slow, decays), members in groups.items()
    ]
