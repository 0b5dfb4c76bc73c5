"""Side-cars: what they may say, and who has the last word."""

from pathlib import Path

import pytest

from segbatch.config import parse
from segbatch.errors import ConfigError
from segbatch.models.base import Choice, InputSpec
from segbatch.models.side_car import (
    SideCar,
    check_keys,
    choice_of,
    class_table_for,
    embedded,
    input_spec_of,
    merged,
    own_table,
    read_side_car,
    side_car_uri,
)
from segbatch.records import ClassInfo, ClassTable

OWN = ClassTable((ClassInfo(0, "wall"), ClassInfo(1, "cat", isthing=True)))


def names(table: ClassTable) -> list[str]:
    return [c.name for c in table.classes]


def things(table: ClassTable) -> list[bool]:
    return [c.isthing for c in table.classes]


def test_it_lies_beside_a_file_or_a_folder(tmp_path: Path) -> None:
    for name in ("net.onnx", "folder"):
        (tmp_path / f"{name}.toml").write_text('licence = "MIT"\nmean = [0, 0.5, 1]')
        assert read_side_car(f"{tmp_path}/{name}/") == SideCar(licence="MIT", mean=(0, 0.5, 1))
        assert side_car_uri(f"{tmp_path}/{name}/") == f"{tmp_path}/{name}.toml"
    assert read_side_car(f"{tmp_path}/other") == SideCar()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"mean = [", "not TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"meen = [0, 0, 0]", "unknown key meen; did you mean mean"),
        (b"mean = [123.7, 116.3, 103.5]", "mean.0 = 123.7"),
        (b"std = [0, 1, 1]", "greater than 0"),
        (b"mean = [0.5]", "mean"),
        (b'output = "softmax"', "output = 'softmax'"),
        (b'output = "logits"\nscores = "labels"', "unknown key scores"),
        (b"height = 0", "height = 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "net.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_side_car(f"{tmp_path}/net")
    assert f"{tmp_path}/net.toml" in str(caught.value)


def test_scores_is_another_name_of_output() -> None:
    assert parse(SideCar, {"scores": "probabilities"}, "x").output == "probabilities"


def test_classes_come_from_the_user_then_the_side_car_then_the_file(tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("x\ny\n")
    given, said = f"{tmp_path}/given.txt", SideCar(classes=("a", "b"), label_ids=(5, 400))
    assert names(class_table_for("net", 2, given, said, OWN)) == ["x", "y"]
    table = class_table_for("net", 2, "", said, OWN)
    assert [(c.label_id, c.name) for c in table.classes] == [(5, "a"), (400, "b")]
    assert class_table_for("net", 2, "", SideCar(), OWN) == OWN
    assert class_table_for("net", None, "", SideCar(), None) == ClassTable(())
    assert class_table_for("net", 7, "", SideCar(), ClassTable(())) == ClassTable(())


def test_the_number_of_classes_must_be_right(tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("x\n")
    given = f"{tmp_path}/given.txt"
    net = f"{tmp_path}/net"
    for words, classes_uri, said, own in (
        (f"{given} names 1 classes, {net} has 3 outputs", given, SideCar(), None),
        (f"{net}.toml names 2 classes, {net} has 3 outputs", "", SideCar(classes=("a", "b")), None),
        (f"{net} names 2 classes, {net} has 3 outputs", "", SideCar(), OWN),
    ):
        with pytest.raises(ConfigError, match=words):
            class_table_for(net, 3, classes_uri, said, own)
        assert class_table_for(net, None, classes_uri, said, own).classes


def test_things_are_said_or_taken_over() -> None:
    renamed = SideCar(classes=("mur", "chat"))
    assert things(class_table_for("net", 2, "", renamed, OWN)) == [False, True]
    assert things(class_table_for("net", 2, "", renamed, None)) == [False, False]
    assert things(class_table_for("net", 2, "", SideCar(things=("wall",)), OWN)) == [True, False]
    assert things(class_table_for("net", None, "", SideCar(classes=("a", "b", "c")), OWN)) == [False] * 3
    with pytest.raises(ConfigError, match=r"things names dog, which are no classes \(the classes are wall, cat\)"):
        class_table_for("net", 2, "", SideCar(things=("dog",)), OWN)


def test_what_it_says_takes_the_place_of_the_default() -> None:
    default = InputSpec(height=8, width=9, resize="letterbox", divisor=4)
    assert input_spec_of(SideCar(), default) == default
    said = SideCar(width=12, mean=(0, 0, 0), layout="nhwc", dtype="uint8", align_corners=True)
    spec = input_spec_of(said, default)
    assert (spec.height, spec.width, spec.resize, spec.divisor) == (8, 12, "letterbox", 4)
    assert (spec.mean, spec.layout, spec.dtype, spec.align_corners) == ((0, 0, 0), "nhwc", "uint8", True)
    assert input_spec_of(SideCar(height=3, width=4), InputSpec()).resize == "stretch"
    assert input_spec_of(SideCar(height=3, width=4, resize="short-side"), InputSpec()).resize == "short-side"
    assert input_spec_of(SideCar(height=3), InputSpec()).resize == "none"
    assert choice_of(SideCar(), Choice(top_k=3)) == Choice(top_k=3)
    assert choice_of(SideCar(min_score=0.0, stuff_area=0), Choice(top_k=3)) == Choice(0.0, top_k=3, stuff_area=0)


def test_keys_that_a_loader_does_not_act_upon_are_refused() -> None:
    said = SideCar(classes=("a",), licence="MIT", divisor=3, mean=(0, 0, 0))
    check_keys(said, "net", ("divisor", "mean"))
    with pytest.raises(ConfigError, match=r"net.toml: divisor cannot be chosen .*understood here: .*mean"):
        check_keys(said, "net", ("mean",))


def test_what_a_file_says_of_itself() -> None:
    own = embedded({"segbatch.json": '{"classes": ["a", "b"], "things": ["b"], "divisor": 8}', "names": "[1]"}, "net")
    assert own == SideCar(classes=("a", "b"), things=("b",), divisor=8)
    assert (names(own_table(own, "net")), things(own_table(own, "net"))) == (["a", "b"], [False, True])
    assert own_table(SideCar(), "net") == ClassTable(())
    assert merged(own, SideCar(divisor=2, mean=(0, 0, 0))) == own.model_copy(update={"divisor": 2, "mean": (0, 0, 0)})
    assert embedded({}, "net") == embedded({"author": "x"}, "net") == SideCar()


@pytest.mark.parametrize(
    "text", ["{0: 'a', 1: 'b'}", '{"0": "a", "1": "b"}', "{1: 'b', 0: 'a'}", "['a', 'b']", '["a", "b"]']
)
def test_names_as_ultralytics_writes_them(text: str) -> None:
    assert embedded({"names": text}, "net").classes == ("a", "b")
    said = embedded({"names": text, "imgsz": "640", "license": "AGPL-3.0"}, "net")
    assert (said.height, said.width, said.resize, said.fill, said.licence) == (640, 640, "letterbox", 114, "AGPL-3.0")
    assert embedded({"imgsz": "[480, 640]"}, "net").width == 640


@pytest.mark.parametrize(
    "texts",
    [
        {"names": "{0: 'a', 2: 'b'}"},
        {"names": "person"},
        {"names": "__import__('os').getcwd()"},
        {"names": "(" * 5000},
        {"names": "7"},
        {"imgsz": "'large'"},
        {"imgsz": "[1, 2, 3]"},
        {"segbatch.json": "[]"},
        {"segbatch.json": '{"meen": 1}'},
        {"segbatch.json": "{"},
    ],
)
def test_metadata_that_is_not_understood(texts: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="net"):
        embedded(texts, "net")
