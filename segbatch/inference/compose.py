"""From what the user gives to a ``ModelSource``: one model, an ensemble ``a+b``, or ``cascade:DETECTOR,SEGMENTER``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from segbatch.config import digest_of
from segbatch.errors import ConfigError
from segbatch.inference.cascade import CascadeSegmenter, cascade_spec
from segbatch.inference.options import InferenceOptions
from segbatch.inference.pipeline import Predictor
from segbatch.inference.views import ViewsSegmenter, check_views, orders_of
from segbatch.models import registry
from segbatch.models.base import InputSpec, ModelSpec, Segmenter
from segbatch.models.parts import Part, parts_of
from segbatch.models.registry import ModelSource

CASCADE = "cascade:"
_NEXT_MODEL = re.compile(r"\+(?=[A-Za-z0-9][A-Za-z0-9_.-]*[@:])")


@dataclass(frozen=True, slots=True)
class ViewsSource:
    """One model or several of the same classes, used as the options say."""

    members: tuple[ModelSource, ...]
    options: InferenceOptions

    @property
    def has_parts(self) -> bool:
        """See ``models.parts``."""
        return all(getattr(m, "has_parts", False) for m in self.members)

    @property
    def reference(self) -> str:
        """The members' references, joined by ``+``."""
        return "+".join(m.reference for m in self.members)

    def describe(self) -> ModelSpec:
        """See ``ModelSource``.

        Raises:
            ConfigError: likewise, or models that cannot be put together.
        """
        return self._spec([m.describe() for m in self.members])

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        loaded = [m.load(threads) for m in self.members]
        spec = self._spec([s.spec for s in loaded])
        predictors = [Predictor(s, 1, self.options.choice(s.spec.choice)) for s in loaded]
        return ViewsSegmenter(predictors, spec, self.options)

    def _spec(self, specs: Sequence[ModelSpec]) -> ModelSpec:
        first = specs[0]
        if self.options.confidence and first.task != "semantic":
            raise ConfigError(
                f"model {first.name} gives {first.task} masks, no probability of a pixel", "leave --confidence out"
            )
        digest = digest_of([*(s.digest for s in specs), self.options.model_dump(mode="json")])
        for spec in specs:
            orders_of(spec, first)
            check_views(spec, self.options)
        return ModelSpec(
            name=self.reference,
            task=first.task,
            classes=first.classes,
            input=InputSpec(layout="nhwc", dtype="uint8"),
            output="own",
            digest=digest,
            licence=" and ".join(dict.fromkeys(s.licence for s in specs if s.licence)),
            choice=self.options.choice(first.choice),
        )


@dataclass(frozen=True, slots=True)
class ChosenSource:
    """A model of which other detections count than it says itself."""

    member: ModelSource
    options: InferenceOptions

    @property
    def has_parts(self) -> bool:
        """See ``models.parts``."""
        return bool(getattr(self.member, "has_parts", False))

    @property
    def reference(self) -> str:
        """The model's."""
        return self.member.reference

    def describe(self) -> ModelSpec:
        """See ``ModelSource``.

        Raises:
            ConfigError: likewise, or a model that has nothing to choose from.
        """
        return self._spec(self.member.describe())

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        loaded = self.member.load(threads)
        return _Chosen(loaded, self._spec(loaded.spec))

    def _spec(self, spec: ModelSpec) -> ModelSpec:
        if self.options.confidence and spec.output not in ("logits", "probabilities"):
            raise ConfigError(
                f"model {spec.name} gives {spec.output}, no probability of a pixel", "leave --confidence out"
            )
        if self.options.limits and spec.output not in ("detections", "panoptic"):
            raise ConfigError(
                f"model {spec.name} gives {spec.output}: no score, suppression or area limit applies to it",
                "leave --min-score, --nms, --top-k, --mask-threshold and --stuff-area out; hf: takes its own behind "
                "its name, hf:FOLDER?min_score=0.5",
            )
        choice = self.options.choice(spec.choice)
        changed = digest_of([spec.digest, self.options.model_dump(mode="json")])
        return replace(spec, choice=choice, digest=changed)


class _Chosen:
    """The model with another spec."""

    def __init__(self, segmenter: Segmenter, spec: ModelSpec) -> None:
        self.spec = spec
        self.forward = segmenter.forward
        self._member = segmenter
        if spec.input.resize == "own":
            self.prepare = segmenter.prepare  # type: ignore[attr-defined]

    def parts(self) -> Sequence[Part]:
        """See ``models.parts.HasParts``."""
        return parts_of(self._member)


@dataclass(frozen=True, slots=True)
class CascadeSource:
    """See ``segbatch.inference.cascade``."""

    detector: ModelSource
    segmenter: ModelSource

    @property
    def reference(self) -> str:
        """``cascade:DETECTOR,SEGMENTER``."""
        return f"{CASCADE}{self.detector.reference},{self.segmenter.reference}"

    def describe(self) -> ModelSpec:
        """See ``ModelSource``."""
        return self._spec(self.detector.describe(), self.segmenter.describe())

    def load(self, threads: int) -> Segmenter:
        """See ``ModelSource``."""
        first, second = Predictor(self.detector.load(threads), 1), Predictor(self.segmenter.load(threads), 1)
        return CascadeSegmenter(first, second, self._spec(first.spec, second.spec))

    def _spec(self, detector: ModelSpec, segmenter: ModelSpec) -> ModelSpec:
        return cascade_spec(self.reference, detector, segmenter, digest_of([detector.digest, segmenter.digest]))


def source(reference: str, classes_uri: str = "", options: InferenceOptions | None = None) -> ModelSource:
    """The source that a reference names; reads nothing yet.

    Args:
        reference: ``name@checkpoint-uri``, ``loader:reference``, several of them joined by ``+`` (an ensemble), or
            ``cascade:DETECTOR,SEGMENTER``.
        classes_uri: a class list in the place of the models' own; of a cascade, in the place of the segmenter's.
        options: how it is used.

    Raises:
        ConfigError: no such name; lists the known ones and the nearest.
    """
    options = options or InferenceOptions()
    if reference.startswith(CASCADE):
        found: ModelSource = _cascade(reference, classes_uri)
        if options != InferenceOptions():
            raise ConfigError(f"model {reference}: a cascade takes no tiles, views or limits", "give it without them")
        return found
    members = tuple(registry.source(r, classes_uri) for r in _NEXT_MODEL.split(reference))
    if len(members) > 1 or options.several_views:
        return ViewsSource(members, options)
    if options.limits or options.confidence:
        return ChosenSource(members[0], options)
    return members[0]


def _cascade(reference: str, classes_uri: str) -> CascadeSource:
    parts = re.split(r",(?=[A-Za-z0-9][A-Za-z0-9_.-]*[@:])", reference.removeprefix(CASCADE))
    if len(parts) != 2:
        raise ConfigError(
            f"model {reference} names {len(parts)} models", "a cascade is cascade:DETECTOR,SEGMENTER, two references"
        )
    return CascadeSource(registry.source(parts[0]), source(parts[1], classes_uri))
