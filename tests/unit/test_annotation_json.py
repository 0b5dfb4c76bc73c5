"""Annotation files cut into raw slices: the groups of plain ``json``, and every way in which a file can be wrong."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbatch.datasets import annotation_json
from segbatch.datasets.annotation_json import CocoImage, Rle
from segbatch.errors import ConfigError, DataError

SharedData = Callable[[str], Path]
URI = "s3://bucket/instances.json"

ids = st.integers(0, 5) | st.integers(-(2**70), 2**70) | st.sampled_from(["", "1", "a/b", "größe \u2028 😀", 'q"\\'])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e6, 1e6) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
segments = st.lists(
    st.fixed_dictionaries({"id": st.integers(0, 2**24), "category_id": st.integers(0, 200)}), max_size=3
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """COCO documents: few ids, so that groups form, images without annotations, orphans and foreign fields."""
    known = draw(st.lists(ids, max_size=6))
    images = [{"file_name": draw(texts), "id": i, "extra": draw(values)} for i in known]
    owners = draw(st.lists(st.sampled_from(known) | ids if known else ids, max_size=12))
    annotations = [{"segments_info": draw(segments), "image_id": i, "x": draw(values)} for i in owners]
    parts = {"images": images, "annotations": annotations, "info": draw(values), "categories": []}
    return {name: parts[name] for name in draw(st.permutations(sorted(parts)))}


def dumped(document: Any, spaced: bool = False, ascii_only: bool = True) -> bytes:
    return json.dumps(document, ensure_ascii=ascii_only, indent=3 if spaced else None).encode()


def parsed(raws: list[memoryview]) -> list[Any]:
    return [json.loads(bytes(raw)) for raw in raws]


def annotation(**fields: Any) -> dict[str, Any]:
    """A good annotation with some fields changed; None leaves a field out."""
    good = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4.5], "segmentation": [[0, 0, 4, 0, 4, 4.25]]}
    return {name: value for name, value in (good | fields).items() if value is not None}


def refused(data: bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        annotation_json.split_coco(data, URI)
    assert URI in caught.value.problem
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return caught.value


class TestSplitCoco:
    @pytest.mark.long
    @settings(deadline=None, max_examples=150)
    @given(documents(), st.booleans(), st.booleans())
    def test_groups_are_those_of_plain_json(self, document: dict[str, Any], spaced: bool, ascii_only: bool) -> None:
        data = dumped(document, spaced, ascii_only)
        found = annotation_json.split_coco(data, URI)
        naive = [
            (i["id"], i["file_name"], [a for a in document["annotations"] if a["image_id"] == i["id"]])
            for i in document["images"]
        ]
        assert [(image.id, image.file_name, parsed(raws)) for image, raws in found.items()] == naive
        known = [i["id"] for i in document["images"]]
        orphans = [a for a in document["annotations"] if a["image_id"] not in known]
        assert {i: parsed(r) for i, r in found.orphans().items()} == {
            i: [a for a in orphans if a["image_id"] == i] for i in {a["image_id"] for a in orphans}
        }
        assert sorted(map(str, found.duplicate_ids())) == sorted(str(i) for i in set(known) if known.count(i) > 1)
        assert found.info == document["info"]

    @settings(deadline=None, max_examples=100)
    @given(documents(), st.booleans())
    @pytest.mark.long
    def test_text_holds_the_slices_as_they_stand(self, document: dict[str, Any], spaced: bool) -> None:
        data = dumped(document, spaced, ascii_only=False)
        for image, raws in annotation_json.split_coco(data, URI).items():
            assert all(bytes(raw) in data and raw.readonly for raw in raws)
            text = annotation_json.annotations_text(raws)
            assert text == "[" + ",".join(bytes(raw).decode() for raw in raws) + "]"
            assert json.loads(text) == [a for a in document["annotations"] if a["image_id"] == image.id]

    def test_slices_are_views_of_the_file_and_not_copies(self) -> None:
        data = bytearray(dumped({"images": [{"id": 1, "file_name": "a"}], "annotations": [annotation(note="old")]}))
        ((_, raws),) = annotation_json.split_coco(data, URI).items()  # type: ignore[arg-type]
        data[data.index(b"old") : data.index(b"old") + 3] = b"new"
        assert parsed(raws)[0]["note"] == "new"

    def test_decodes_the_records(self) -> None:
        image = {"id": 9, "file_name": "x/é.jpg", "height": 4, "width": 6, "license": 2, "coco_url": "http://c/9"}
        more = {"flickr_url": "http://f/9", "date_captured": "2013-11-14 11:18:45"}
        category = {"id": 1, "name": "cat", "supercategory": "animal", "isthing": 1, "color": [1, 2, 3]}
        document = {
            "info": {"year": 2017},
            "licenses": [{"id": 2}],
            "categories": [category],
            "images": [image | more],
            "annotations": [],
        }
        found = annotation_json.split_coco(dumped(document), URI)
        assert found.images == (CocoImage(**image, **more),)  # type: ignore[arg-type]
        assert (found.info, found.licenses) == ({"year": 2017}, [{"id": 2}])
        (cat,) = found.categories
        assert (cat.id, cat.name, cat.supercategory, cat.isthing, cat.color) == (1, "cat", "animal", 1, (1, 2, 3))
        assert list(found.items()) == [(found.images[0], [])]

    def test_what_a_file_may_lack_is_none(self) -> None:
        found = annotation_json.split_coco(b'{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', URI)
        assert (found.info, found.licenses, found.categories) == (None, None, ())
        image = found.images[0]
        assert (image.height, image.width, image.license, image.coco_url) == (None, None, None, None)

    def test_numbers_and_texts_are_different_ids(self) -> None:
        images = [{"id": 1, "file_name": "number"}, {"id": "1", "file_name": "text"}]
        document = {"images": images, "annotations": [annotation(image_id="1", id=5), annotation(image_id=1, id=6)]}
        found = annotation_json.split_coco(dumped(document), URI)
        assert [(i.file_name, parsed(r)[0]["id"]) for i, r in found.items()] == [("number", 6), ("text", 5)]
        assert found.duplicate_ids() == ()

    def test_images_of_one_id_share_its_annotations(self) -> None:
        images = [{"id": 4, "file_name": name} for name in "abc"]
        found = annotation_json.split_coco(dumped({"images": images, "annotations": [annotation(image_id=4)]}), URI)
        assert found.duplicate_ids() == (4,)
        assert [len(raws) for _, raws in found.items()] == [1, 1, 1]


class TestBrokenFiles:
    GOOD = (
        dumped({"images": [{"id": 1, "file_name": "größe"}], "annotations": [annotation()]}, ascii_only=False)[:-1]
        + rb', "info": [-1e-5, -0.25E+2, true, false, null, "\ud83d\ude00 \n\\"]}'
    )

    def test_cut_short_anywhere(self) -> None:
        assert len(annotation_json.split_coco(self.GOOD, URI).images) == 1
        for length in range(len(self.GOOD)):
            problem = refused(self.GOOD[:length]).problem
            assert f"cut short: it ends at byte {length}," in problem

    def test_sizes_are_in_the_advice(self) -> None:
        assert refused(self.GOOD[:40]).fix == (
            "download or unpack it again, and compare its size with the source's; it has 40 bytes here"
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"<!DOCTYPE html><html>", r"invalid character \(byte 0\), near b'<!DOCTYPE html><html>'"),
            (b'{"images": [], "annotations": []} {', r"trailing characters \(byte 35\), near b'.*\]\} \{'"),
            (b'{"images": [{"id": 1,}], "annotations": []}', r"trailing comma in object \(byte 21\)"),
            (b'{"images": [{"id": NaN}], "annotations": []}', r"invalid character \(byte 19\), near b'.*NaN"),
            (b"\xef\xbb\xbf{}", r"invalid character \(byte 0\)"),
            (b"\xff\xfe{\x00", r"is not UTF-8 \(byte 0\), near b'\\xff\\xfe"),
            (b'{"images": [], "annotations": ["gr\xf6\xdfe"]}', r"is not UTF-8 \(byte 34\)"),
            (b"[1, 2]", r"\(6 bytes\) is not a COCO annotation file: Expected `object`, got `array`"),
            (b'{"annotations": []}', "missing required field `images`"),
            (b'{"images": []}', "missing required field `annotations`"),
            (b'{"images": 3, "annotations": []}', r"Expected `array`, got `int` - at `\$\.images`"),
            (b'{"images": [], "annotations": null}', r"Expected `array`, got `null` - at `\$\.annotations`"),
            (b'{"images":' + b"[" * 100_000, "nested too deep"),
        ],
    )
    def test_says_what_is_wrong_and_where(self, data: bytes, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            annotation_json.split_coco(data, URI)
        refused(data)

    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
    def test_characters_may_lie_across_chunks(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(annotation_json, "_UTF8_CHUNK", chunk)
        data = dumped({"images": [{"id": "größe \u20ac 😀", "file_name": "a"}], "annotations": []}, ascii_only=False)
        assert annotation_json.split_coco(data, URI).images[0].id == "größe \u20ac 😀"
        broken = data.replace("€".encode(), b"\xe2\x82("[:3])
        with pytest.raises(ConfigError, match=rf"not UTF-8 \(byte {broken.index(0xE2)}\)"):
            annotation_json.split_coco(broken, URI)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ('{"file_name": "a"}', "missing required field `id`"),
            ('{"id": 3}', "missing required field `file_name`"),
            ('{"id": null, "file_name": "a"}', r"Expected `int \| str`, got `null` - at `\$\.id`"),
            ('{"id": 1.5, "file_name": "a"}', r"got `float` - at `\$\.id`"),
            ('{"id": true, "file_name": "a"}', r"got `bool` - at `\$\.id`"),
            ('{"id": 3, "file_name": 7}', r"Expected `str`, got `int` - at `\$\.file_name`"),
            ('{"id": 3, "file_name": "a", "height": "4"}', r"at `\$\.height`"),
            ("7", "Expected `object`, got `int`"),
        ],
    )
    def test_an_image_is_named_by_index_and_byte(self, images: str, message: str) -> None:
        data = f'{{"images": [{{"id": 1, "file_name": "ok"}},\n {images}], "annotations": []}}'.encode()
        with pytest.raises(ConfigError, match=message):
            annotation_json.split_coco(data, URI)
        assert f"images[1] of {URI}, at byte {data.index(images.encode())}:" in refused(data).problem

    def test_an_annotation_is_named_by_index_and_byte(self) -> None:
        first, second = dumped(annotation()), dumped(annotation(image_id=None))
        data = b'{"annotations": [' + first + b" , " + second + b'], "images": []}'
        problem = refused(data).problem
        assert f"annotations[1] of {URI}, at byte {data.index(second)}: " in problem
        assert "`image_id`" in problem

    def test_a_category_and_the_info_are_named_too(self) -> None:
        tail = b'"images": [], "annotations": []}'
        assert "categories[0]" in refused(b'{"categories": [{"id": 1}], ' + tail).problem
        assert f"info of {URI}, at byte 9: Number out of range" in refused(b'{"info": 1e999, ' + tail).problem


class TestDecode:
    def test_records(self) -> None:
        runs = {"size": [4, 6], "counts": [0, 24]}
        text = json.dumps([annotation(), annotation(id="b", segmentation=runs, iscrowd=1, area=2.5, extra=[1])])
        polygons, crowd = annotation_json.decode_annotations(text, URI)
        assert (polygons.id, polygons.category_id, polygons.bbox) == (7, 3, (1, 2, 3, 4.5))
        assert (polygons.segmentation, polygons.iscrowd, polygons.area) == ([[0, 0, 4, 0, 4, 4.25]], 0, None)
        assert (crowd.id, crowd.segmentation, crowd.iscrowd, crowd.area) == ("b", Rle((4, 6), [0, 24]), 1, 2.5)
        text = json.dumps([annotation(segmentation={"size": [4, 6], "counts": "0h0"})])
        assert annotation_json.decode_annotations(text)[0].segmentation == Rle((4, 6), "0h0")
        assert annotation_json.decode_annotations("[]") == ()

    @pytest.mark.parametrize(
        ("bad", "name", "field"),
        [
            (annotation(id=None), "annotation at index 1 of image 1", "`id`"),
            (annotation(category_id=None), "annotation 7", "`category_id`"),
            (annotation(bbox=None), "annotation 7", "`bbox`"),
            (annotation(segmentation=None), "annotation 7", "`segmentation`"),
            (annotation(segmentation="runs", id="x"), "annotation 'x'", "$.segmentation`"),
            (annotation(segmentation=[1, 2, 3]), "annotation 7", "$.segmentation[0]`"),
            (annotation(segmentation=[["1"]]), "annotation 7", "$.segmentation[0][0]`"),
            (annotation(segmentation={"size": [4]}), "annotation 7", "$.segmentation.size`"),
            (annotation(segmentation={"size": [4, 5]}), "annotation 7", "`counts` - at `$.segmentation`"),
            (annotation(bbox=[1, 2, 3]), "annotation 7", "$.bbox`"),
            (annotation(category_id="3"), "annotation 7", "$.category_id`"),
            (annotation(iscrowd=2), "annotation 7", "$.iscrowd`"),
            (["no object"], "annotation at index 1", "Expected `object`"),
        ],
    )
    def test_errors_name_annotation_and_field(self, bad: Any, name: str, field: str) -> None:
        with pytest.raises(DataError) as caught:
            annotation_json.decode_annotations(json.dumps([annotation(id=6), bad]), URI)
        assert caught.value.problem.startswith(f"{name} of {URI}: ")
        assert field in caught.value.problem
        assert (caught.value.code, caught.value.uri) == ("bad-annotation", URI)

    @pytest.mark.parametrize("text", ["", "{}", "[", "null", '[{"id": 1}'])
    def test_no_array(self, text: str) -> None:
        with pytest.raises(DataError, match=f"annotations of {URI}"):
            annotation_json.decode_annotations(text, URI)

    def test_panoptic(self) -> None:
        segment = {"id": 65793, "category_id": 1, "area": 12, "bbox": [0, 1, 2, 3], "iscrowd": 1, "x": {"y": []}}
        good = {"image_id": 5, "file_name": "5.png", "segments_info": [segment, {"id": 3, "category_id": 9}]}
        (found,) = annotation_json.decode_panoptic_annotations(json.dumps([good]), URI)
        assert (found.image_id, found.file_name) == (5, "5.png")
        assert [(s.id, s.category_id, s.area, s.iscrowd) for s in found.segments_info] == [
            (65793, 1, 12, 1),
            (3, 9, None, 0),
        ]
        bad = good | {"segments_info": [segment, {"id": 3}]}
        with pytest.raises(DataError, match=r"of image 5 of .*`category_id` - at `\$\.segments_info\[1\]`"):
            annotation_json.decode_panoptic_annotations(json.dumps([bad]), URI)

    def test_results(self) -> None:
        good = {"image_id": 5, "category_id": 2, "score": 0.5, "bbox": [0, 1, 2, 3]}
        (found,) = annotation_json.decode_results(json.dumps([good]))
        assert (found.score, found.bbox, found.segmentation) == (0.5, (0, 1, 2, 3), None)
        with pytest.raises(DataError, match=r"annotation at index 0 of image 5: .*`score`"):
            annotation_json.decode_results(json.dumps([{"image_id": 5, "category_id": 2}]))


class TestDigest:
    def test_does_not_depend_on_the_place_in_the_file(self) -> None:
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)]
        annotations = [annotation(image_id=i % 5, id=i) for i in range(20)]
        first = annotation_json.split_coco(dumped({"images": images, "annotations": annotations}), URI)
        rest = random.Random(1).sample([a for a in annotations if a["image_id"] != 2], 16)
        shuffled = {"info": "x" * 99, "annotations": rest + [a for a in annotations if a["image_id"] == 2]}
        second = annotation_json.split_coco(dumped(shuffled | {"images": images[::-1]}), URI)
        assert annotation_json.digest(first.annotations[2]) == annotation_json.digest(second.annotations[2])

    def test_one_changed_annotation_changes_one_image(self) -> None:
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)]
        annotations = [annotation(image_id=i % 5, id=i) for i in range(20)]

        def digests() -> dict[Any, str]:
            document = annotation_json.split_coco(dumped({"images": images, "annotations": annotations}), URI)
            return {image.id: annotation_json.digest(raws) for image, raws in document.items()}

        before = digests()
        annotations[8]["category_id"] = 4
        after = digests()
        assert [i for i in before if before[i] != after[i]] == [3]
        assert len(set(before.values())) == 5

    def test_another_indentation_is_no_change(self) -> None:
        raws = [json.dumps(annotation(image_id=1, id=i)).encode() for i in range(3)]
        indented = [json.dumps(json.loads(r), indent=3).encode() for r in raws]
        assert annotation_json.digest(raws) == annotation_json.digest(indented)

    def test_order_and_bounds_count(self) -> None:
        raws = [b'{"id":1}', b'{"id":2}', b'{"id":1}']
        kinds = [raws[:0], raws[:1], raws[:2], raws[1:], raws, [b"[" + b",".join(raws) + b"]"]]
        found = {annotation_json.digest(r) for r in kinds}
        assert len(found) == len(kinds)
        assert all(len(d) == 16 and int(d, 16) >= 0 for d in found)


class TestResults:
    @settings(deadline=None, max_examples=80)
    @given(st.lists(st.tuples(ids, values), max_size=12), st.booleans(), st.booleans())
    def test_groups_are_those_of_plain_json(self, rows: list[tuple[Any, Any]], spaced: bool, panoptic: bool) -> None:
        results = [{"x": value, "image_id": image_id} for image_id, value in rows]
        data = dumped({"annotations": results} if panoptic else results, spaced, ascii_only=False)
        naive: dict[Any, list[Any]] = {}
        for result in results:
            naive.setdefault(result["image_id"], []).append(result)
        found = annotation_json.split_results(data, URI)
        assert [(i, parsed(raws)) for i, raws in found.items()] == list(naive.items())
        assert len(found) == len(naive)

    def test_errors(self) -> None:
        with pytest.raises(ConfigError, match=r"results\[1\] of .* at byte 17: .*`image_id`"):
            annotation_json.split_results(b'[{"image_id": 1},{"score": 1}]', URI)
        with pytest.raises(ConfigError, match=r"not a COCO results file: .*`annotations`"):
            annotation_json.split_results(b'{"images": []}', URI)
        with pytest.raises(ConfigError, match="cut short: it ends at byte 14"):
            annotation_json.split_results(b'[{"image_id": ', URI)

    def test_an_image_without_results_is_not_there(self) -> None:
        with pytest.raises(KeyError):
            annotation_json.split_results(b"[]", URI)[1]


class TestFrames:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_both_layouts_in_file_order(self, wrapped: bool) -> None:
        frames = [
            {"labels": [{"category": "road", "rle": {"counts": '\\"]', "size": [2, 3]}}], "name": "b.jpg"},
            {"name": "a.jpg", "videoName": "v1", "labels": None},
            {"name": "ü.jpg", "videoName": None},
        ]
        data = dumped({"config": {"categories": []}, "frames": frames} if wrapped else frames, spaced=wrapped)
        found = annotation_json.split_frames(data, URI)
        assert [(f.name, f.video_name) for f in found] == [("b.jpg", None), ("a.jpg", "v1"), ("ü.jpg", None)]
        assert parsed([f.raw for f in found]) == frames

    def test_errors(self) -> None:
        with pytest.raises(ConfigError, match=r"frames\[1\] of .* at byte 15: .*`name`"):
            annotation_json.split_frames(b'[{"name": "a"},{"labels": []}]', URI)
        with pytest.raises(ConfigError, match=r"not a file of frames: .*`frames`"):
            annotation_json.split_frames(b'{"images": []}', URI)
        with pytest.raises(ConfigError, match=r"not a file of frames: Expected `.*`, got `str`"):
            annotation_json.split_frames(b'"frames"', URI)


class TestRealFiles:
    @pytest.mark.parametrize(
        ("path", "images"),
        [
            ("coco_tiny/annotations/instances_train2017.json", 50),
            ("coco_val2014_100/instances_val2014_100.json", 100),
            ("coco_panoptic/panoptic_examples.json", None),
        ],
    )
    def test_coco(self, path: str, images: int | None, shared_data: SharedData) -> None:
        data = shared_data(f"data/{path}").read_bytes()
        document, found = json.loads(data), annotation_json.split_coco(data, path)
        assert images in (None, len(found.images))
        assert [i.id for i in found.images] == [i["id"] for i in document["images"]]
        assert [c.name for c in found.categories] == [c["name"] for c in document["categories"]]
        assert (found.orphans(), found.duplicate_ids()) == ({}, ())
        panoptic = "panoptic" in path
        decode = annotation_json.decode_panoptic_annotations if panoptic else annotation_json.decode_annotations
        for image, raws in found.items():
            naive = [a for a in document["annotations"] if a["image_id"] == image.id]
            assert parsed(raws) == naive
            assert len(decode(annotation_json.annotations_text(raws), path)) == len(naive)

    @pytest.mark.parametrize("kind", ["bbox", "segm"])
    def test_results(self, kind: str, shared_data: SharedData) -> None:
        data = shared_data(f"data/coco_val2014_100/instances_val2014_fake{kind}100_results.json").read_bytes()
        found = annotation_json.split_results(data, kind)
        assert sum(len(raws) for raws in found.values()) == len(json.loads(data))
        for image_id, raws in found.items():
            results = annotation_json.decode_results(annotation_json.annotations_text(raws), kind)
            assert {r.image_id for r in results} == {image_id}
            assert all((r.segmentation is None) == (kind == "bbox") for r in results)

    @pytest.mark.parametrize(
        "path", ["to_rle/test-rle.json", "to_rle/ins_seg/scores.json", "sem_seg_rle/sem_seg_sample.json"]
    )
    def test_frames(self, path: str, shared_data: SharedData) -> None:
        data = shared_data(f"data/bdd100k/{path}").read_bytes()
        document = json.loads(data)
        frames = document["frames"] if isinstance(document, dict) else document
        found = annotation_json.split_frames(data, path)
        assert parsed([f.raw for f in found]) == frames
        assert [f.name for f in found] == [f["name"] for f in frames]
