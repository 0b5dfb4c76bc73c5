"""Configuration: TOML, --set, and messages that name the key and the fix."""

from pathlib import Path

import pytest

from segbatch.config import PlanConfig, RunOptions, apply_sets, differences, digest_of, load_toml, nearest, parse
from segbatch.errors import ConfigError


def test_sets_are_toml_values() -> None:
    before = {"plan": {"shard_rows": 1}}
    after = apply_sets(before, ["plan.shard_rows=100", "engine.kind=inline", "a.b.c=[1, 2]", "x=", "y=1.5"])
    assert after == {
        "plan": {"shard_rows": 100},
        "engine": {"kind": "inline"},
        "a": {"b": {"c": [1, 2]}},
        "x": "",
        "y": 1.5,
    }
    assert before == {"plan": {"shard_rows": 1}}


@pytest.mark.parametrize("text", ["plan.shard_rows", "=3", " = 3"])
def test_sets_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form key=value"):
        apply_sets({}, [text])


def test_set_below_a_value() -> None:
    with pytest.raises(ConfigError, match="plan is not a table"):
        apply_sets({}, ["plan=3", "plan.shard_rows=3"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"plan": {"shard_row": 3}},
            "unknown key plan.shard_row; did you mean shard_rows? "
            "(known: shard_bytes, shard_rows, shard_seconds, usual_rows)",
        ),
        ({"plan": {"shard_rows": -1}}, "plan.shard_rows = -1: Input should be greater than or equal to 0"),
        ({"engine": {"kind": "spark"}}, "engine.kind = 'spark'"),
        ({"nonsense": 1}, "unknown key nonsense (known: cost, engine, inference, plan)"),
    ],
)
def test_wrong_keys_and_values(data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(RunOptions, data, "--set")
    assert str(caught.value).startswith("--set: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_then_sets(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("shard_rows = 5\nshard_bytes = 7\n")
    assert load_toml(PlanConfig, str(path), ["shard_rows=6"]) == PlanConfig(shard_rows=6, shard_bytes=7)
    path.write_text("shard_rows = \n")
    with pytest.raises(ConfigError, match=r"a.toml is not TOML: .*line 1"):
        load_toml(PlanConfig, str(path))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        load_toml(PlanConfig, str(tmp_path / "b.toml"))


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PlanConfig().shard_rows = 3  # type: ignore[misc]


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    assert len(digest_of("")) == 16


def test_differences() -> None:
    old, new = {"a": 1, "b": {"c": 1, "d": 2}}, {"a": 1, "b": {"c": 3, "d": 2}, "e": 4}
    assert differences(old, new) == ["b.c: 1 -> 3", "e: None -> 4"]


def test_nearest() -> None:
    assert nearest("unett", ["unet", "color"]) == "; did you mean unet?"
    assert nearest("coco", ["color", "coco-stuff"]) == "; did you mean color?"
    assert nearest("coco", ["camvid", "coco-stuff"]) == "; did you mean coco-stuff?"
    assert nearest("zzz", ["unet", "color"]) == ""
