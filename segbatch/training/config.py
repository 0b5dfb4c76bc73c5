"""The training file."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segbatch.config import Config
from segbatch.inference.options import InferenceOptions
from segbatch.models.config import ModelConfig, Size, UNetConfig

_LIGHT = ("brightness", "contrast", "color")
_RGB = 3


class DataConfig(Config):
    """How photos and CT slices become training crops.

    Attributes:
        crop: (height, width) of a training crop on the network's grid. None: the network's input size where that is
            fixed, else what the smallest photo takes up there; at most 512 x 512.
        scale: zoom of the photo, drawn log-uniformly from this range; 1 is the grid that the network is fed later.
        flip: mirror half of the crops.
        brightness: crops of photos are made darker or brighter by up to this fraction; those of CT slices never.
        contrast: likewise.
        color: likewise; each channel is made weaker or stronger by up to this fraction.
        elastic: crops are bent: standard deviation in pixels of random displacements on a grid of 3 x 3 (U-Net: 10);
            0 for none.
        border_weight: semantic networks: the greatest weight that pixels between neighbouring objects have on top of
            their class's (U-Net: 10); 0 for none. Objects are the table's instances, where a photo has none the
            connected pieces of the classes with ``isthing``.
        border_sigma: how far that weight reaches, in pixels of the network's grid; see ``separation``.
        cache_mb: photos (decoded) and CT slices (as they are stored) kept in memory; the others are read anew whenever
            they are needed.
    """

    crop: Size | None = None
    scale: tuple[float, float] = (0.6, 1.4)
    flip: bool = True
    brightness: float = Field(default=0.25, ge=0, lt=1)
    contrast: float = Field(default=0.25, ge=0, lt=1)
    color: float = Field(default=0.1, ge=0, lt=1)
    elastic: float = Field(default=0.0, ge=0)
    border_weight: float = Field(default=0.0, ge=0)
    border_sigma: float = Field(default=5.0, gt=0)
    cache_mb: int = Field(default=2048, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} is not a range of positive numbers")
        if self.crop and min(self.crop) < 1:
            raise ValueError(f"crop {self.crop} is not positive")
        return self


class OptimConfig(Config):
    """AdamW with a polynomial schedule (power .9), exponentially averaged weights.

    Attributes:
        lr: highest learning rate.
        encoder_lr_scale: factor for a pretrained encoder.
        weight_decay: of convolution weights; normalisation and biases have none.
        epochs: passes over the samples; 0 for no such limit.
        max_minutes: CPU minutes of all threads together; 0 for no such limit. A run limited by time cannot be
            repeated bit by bit.
        batch_size: crops a step.
        warmup_steps: steps of linear increase at the beginning.
        class_weights: of semantic networks. ``sqrt-median``: square root of median-frequency weights (Eigen and Fergus,
            ICCV 2015).
        ema: decay of the averaged weights; 0 takes the last ones.
        dtype: ``auto`` is bfloat16 where the CPU computes in it (AVX512-BF16, AMX), else float32.
    """

    lr: float = Field(default=2e-3, gt=0)
    encoder_lr_scale: float = Field(default=0.3, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: int = Field(default=0, ge=0)
    max_minutes: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=8, ge=1)
    warmup_steps: int = Field(default=30, ge=0)
    class_weights: Literal["sqrt-median", "none"] = "sqrt-median"
    ema: float = Field(default=0.99, ge=0, lt=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class TrainConfig(Config):
    """One training run.

    Attributes:
        out: URI of the checkpoint folder.
        samples: URI of the samples table, or of the root that holds it.
        split: only rows of this split; all when empty.
        val_samples: URI of a samples table to validate on; ``samples`` when empty and ``val_split`` is given.
        val_split: only rows of this split.
        val_every_epochs: validate so often; 0: at the end only.
        val_inference: which detections count on validation photos; photos are fed whole, once.
        seed: of the first weights, the order of the photos and the augmentation.
        model, data, optim: see there.
        checkpoint_every_s: seconds between checkpoints, from which an interrupted training goes on.
        threads: compute threads; 0: all that this process may use.
    """

    out: str
    samples: str
    split: str = ""
    val_samples: str = ""
    val_split: str = ""
    val_every_epochs: int = Field(default=0, ge=0)
    val_inference: InferenceOptions = InferenceOptions()
    seed: int = Field(default=0, ge=0)
    model: Annotated[ModelConfig, Field(discriminator="kind")] = UNetConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    threads: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.kind != "color" and not (self.optim.epochs or self.optim.max_minutes):
            raise ValueError("the training has no end: set optim.epochs or optim.max_minutes")
        if getattr(self.model, "hounsfield", None) is not None:
            used = [n for n in _LIGHT if n in self.data.model_fields_set and getattr(self.data, n)]
            if used:
                raise ValueError(f"data.{used[0]} is for photos; Hounsfield units stay as they are: leave it out")
        if self.model.kind == "unet" and self.model.encoder and self.model.pretrained and self.model.channels != _RGB:
            raise ValueError(
                f"channels {self.model.channels}: the ImageNet weights of {self.model.encoder} are for 3; "
                "set model.pretrained = false"
            )
        if self.val_inference.several_views:
            raise ValueError("val_inference: validation knows no tiles, scales and flip")
        return self

    @property
    def validates(self) -> bool:
        """Whether validation samples were named."""
        return bool(self.val_samples or self.val_split)

    def deciding(self) -> dict[str, object]:
        """What decides the result: all but where it goes, how often it is saved and how many threads work."""
        left_out = {"out": True, "checkpoint_every_s": True, "threads": True, "data": {"cache_mb"}}
        return self.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
