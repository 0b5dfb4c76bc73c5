"""A network of transformers at work: its image processor, its forward pass, its post-processing."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segbatch.errors import DataError
from segbatch.models import hf_output
from segbatch.models.base import Geometry, ModelSpec
from segbatch.models.hf import Model
from segbatch.models.hf_families import THRESHOLDS
from segbatch.models.parts import Part
from segbatch.records import Prediction

_OUTPUTS = ("logits", "pred_masks", "class_queries_logits", "masks_queries_logits")
"""What post-processing reads of a network's output; one entry for each image."""
_MAX_PIXELS = 1 << 26
"""Larger than this no photo is made: of a strip one pixel high an image processor would make gigabytes."""
_LONGEST_TEXT = 200


def in_short(error: BaseException) -> str:
    """An error's text on one line, its beginning."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


class _Named(nn.Module):
    """A network of transformers that gives the outputs that are read here by name, and nothing else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        """Arguments and results as ``transformers`` names them."""
        out = self.net(**given)
        return {name: out[name] for name in _OUTPUTS if name in out}


class HfSegmenter:
    """A network of transformers on the CPU, with its image processor; in fp32 unless its part is replaced.

    Args:
        net: with its weights, in evaluation mode.
        processor: the image processor.
        model: what it was made of.
        text: token ids of the task, (1, length), for networks that read it.
    """

    def __init__(self, net: Any, processor: Any, model: Model, text: Tensor | None) -> None:
        self.spec: ModelSpec = model.spec
        self._net: nn.Module = _Named(net)
        self._processor = processor
        self._text = text
        self._task_arguments = {"task_inputs": [model.spec.task]} if text is not None else {}
        self._split = bool(getattr(processor, "do_split_image", False))
        self._post = getattr(processor, f"post_process_{model.spec.task}_segmentation")
        self._arguments = _arguments(self._post, model)
        self._score_size = _score_size(self._post, processor)

    # -- input -----------------------------------------------------------------------------------------------------

    def prepare(self, rgb: NDArray[np.uint8]) -> tuple[NDArray[Any], tuple[int, int]]:
        """See ``OwnInput``.

        Returns:
            Float32 (3, h, w). Where the image processor says which pixels are real and not all are, (4, h, w): the
            last channel is 1 for real ones. Where it cuts the photo into k pieces, (3 k, h, w).

        Raises:
            DataError: no photo of these sides can be fed.
        """
        self._check_sides(*rgb.shape[:2])
        owned = rgb if rgb.flags.writeable else rgb.copy()  # torch warns of arrays that are not
        try:
            fed = self._processor(
                images=[owned], input_data_format="channels_last", return_tensors="pt", **self._task_arguments
            )
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise DataError(
                f"the model's image processor refuses a photo of {rgb.shape[0]} x {rgb.shape[1]}: {in_short(error)}",
                "leave it out",
                "unsuitable-size",
            ) from error
        pixels: Tensor = torch.as_tensor(fed["pixel_values"])
        if self._split:
            pieces, _, high, wide = pixels.shape
            return pixels.reshape(pieces * 3, high, wide).numpy(), self._resized(*rgb.shape[:2])
        image, real = pixels[0], fed.get("pixel_mask")
        if real is not None and not bool(torch.as_tensor(real).all()):
            image = torch.cat([image, torch.as_tensor(real).to(image.dtype)])
        return image.numpy(), (int(image.shape[1]), int(image.shape[2]))

    def _check_sides(self, height: int, width: int) -> None:
        size = getattr(self._processor, "size", None)
        short, longest = getattr(size, "shortest_edge", None), getattr(size, "longest_edge", None)
        if short and not longest and short * short * max(height, width) / min(height, width) > _MAX_PIXELS:
            raise DataError(
                f"a photo of {height} x {width}, its shorter side made {short}, is too large to be fed",
                "leave it out",
                "unsuitable-size",
            )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size of a photo before it is cut into pieces, as ``EomtImageProcessor.merge_image_patches`` finds it."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        size = self._processor.size
        high, wide = get_size_with_aspect_ratio((height, width), size["shortest_edge"], size["longest_edge"])
        return int(high), int(wide)

    def _offsets(self, height: int, width: int) -> list[list[int]]:
        """[0, start, end] of every piece of a photo; forward's batch has no room for them."""
        nothing = torch.zeros((1, 1, *self._resized(height, width)))
        offsets: list[list[int]] = self._processor._split_image(nothing, self._processor.size, [0])[1]
        return offsets

    def parts(self) -> list[Part]:
        """See ``parts.HasParts``; which arguments a network for objects is given depends on the photo."""
        return [Part(self.spec.digest, self, "_net", convertible=self.spec.output == "logits")]

    # -- network ---------------------------------------------------------------------------------------------------

    def forward(self, batch: NDArray[Any]) -> NDArray[Any] | list[dict[str, Tensor]]:
        """Scores (n, classes, h, w) float32; for ``own`` the raw outputs of each image by name, a batch of one."""
        images, channels, height, width = batch.shape
        x = torch.from_numpy(np.ascontiguousarray(batch))
        arguments: dict[str, Tensor] = {}
        if channels == 4:
            arguments["pixel_mask"], x = x[:, 3].long(), x[:, :3]
        pieces = channels // 3
        if self._text is not None:
            arguments["task_inputs"] = self._text.expand(images, -1)
        with torch.inference_mode():
            out = self._net(pixel_values=x.reshape(images * pieces, 3, height, width), **arguments)
            if self.spec.output == "own":
                return [{k: v[i * pieces : (i + 1) * pieces] for k, v in out.items()} for i in range(images)]
            scores: NDArray[np.float32] = self._scores(out, images).numpy()
        return scores

    def _scores(self, out: dict[str, Tensor], images: int) -> Tensor:
        if self.spec.output == "logits":
            return out["logits"]
        named = SimpleNamespace(**out, patch_offsets=None)
        sizes = [self._score_size] * images if self._score_size else None
        found = self._post(named, target_sizes=sizes, return_segmentation_scores=True)
        return torch.stack([f.segmentation_scores for f in found])

    # -- output ----------------------------------------------------------------------------------------------------

    def finish(self, raw: dict[str, Tensor], geometry: Geometry) -> Prediction:
        """See ``OwnOutput``."""
        if not all(bool(v.isfinite().all()) for v in raw.values()):
            raise DataError("the model's output is not a number", "check the model's weights", "not-a-number")
        size = (geometry.height, geometry.width)
        offsets = self._offsets(*size) if self._split else None
        with torch.inference_mode():
            outputs = SimpleNamespace(**raw, patch_offsets=offsets)
            found = self._post(outputs, target_sizes=[size], **self._arguments)[0]
        if self.spec.task == "semantic":
            return Prediction(semantic=hf_output.label_map(found, self.spec.classes))
        if self.spec.task == "instance":
            return Prediction(instances=hf_output.instances(found, self.spec.classes, size))
        index_map, segments = hf_output.panoptic(found, self.spec.classes)
        return Prediction(panoptic=index_map, segments=segments)


def _arguments(post: Any, model: Model) -> dict[str, Any]:
    """Arguments of post-processing besides outputs and sizes.

    Masks of instances are asked for one by one where they can be had: in one map, one hides another. Stuff is joined by
    ``hf_output.panoptic``: once it has joined some, the library's ``compute_segments`` gives ids that are taken.
    """
    known = inspect.signature(post).parameters
    chosen = {THRESHOLDS[k]: v for k, v in model.thresholds.items()}
    if model.config["model_type"] == "rf_detr" and "mask_threshold" in chosen:
        chosen["mask_threshold"] = float(torch.tensor(chosen["mask_threshold"]).logit())  # it compares logits
    fixed = {"return_binary_maps": True, "label_ids_to_fuse": set()}
    return {**chosen, **{k: v for k, v in fixed.items() if k in known}}


def _score_size(post: Any, processor: Any) -> tuple[int, int] | None:
    """The target size with which post-processing leaves scores as it computes them; None: no size does it."""
    if inspect.signature(post).parameters["target_sizes"].default is not inspect.Parameter.empty:
        return None
    size = processor.size  # EomtImageProcessor's get_target_size
    return int(size["shortest_edge"]), int(size["longest_edge"] or size["shortest_edge"])
