"""What ``segbatch models`` says, against the networks themselves."""

from pathlib import Path

import network_checks as check
import pytest
import torch

from segbatch import api
from segbatch.errors import ConfigError
from segbatch.models import catalogue, checkpoint, registry
from segbatch.models.architectures import ARCHITECTURES


@pytest.mark.parametrize("card", catalogue.cards(), ids=lambda c: f"{c.architecture} {c.form}")
def test_the_parameters_are_those_of_the_network(card: catalogue.Card) -> None:
    architecture = ARCHITECTURES[card.architecture]
    if card.architecture in ("deeplab", "maskrcnn", "panoptic_fpn") or "encoder" in card.options:
        pytest.importorskip("timm", reason="the extra pretrained is not installed")
    with torch.device("meta"):
        net = architecture.build(architecture.config(**card.options), check.table(card.classes))
    assert check.parameters(net) == card.parameters
    assert card.images_per_s > 0 and "AVX" in catalogue.machine()


def test_every_architecture_has_a_card_and_a_paper() -> None:
    assert {c.architecture for c in catalogue.cards()} == set(ARCHITECTURES)
    assert all(a.paper and a.summary for a in ARCHITECTURES.values())


def test_the_list_names_everything_that_can_stand_as_model() -> None:
    found = api.catalogue("models")
    names = {e["name"] for e in found}
    assert names >= {f"{n}@CHECKPOINT" for n in ARCHITECTURES} | {f"{n}:REFERENCE" for n in registry.LOADERS}
    assert len({frozenset(e) for e in found}) == 1  # one table


def test_all_of_one_model(tmp_path: Path) -> None:
    told = api.describe_model("fcn")
    assert "CVPR 2015" in told["paper"] and "stride" in told["options"] and len(told["forms"]) == 3
    assert told["predict"].startswith("segbatch predict fcn@")
    assert "transformers" in api.describe_model("hf")["summary"]
    net = check.made("unet", width=2, depth=2)
    config = ARCHITECTURES["unet"].config(width=2, depth=2)
    checkpoint.write(str(tmp_path / "net"), net, "unet", config, check.CLASSES, {})
    told = api.describe_model(f"unet@{tmp_path / 'net'}")
    assert told["classes"] == ["sky", "road", "sign"] and told["input"]["divisor"] == 2
    with pytest.raises(ConfigError, match="unknown model"):
        api.describe_model("fnc")
