"""Versioned Arrow schemas of every table, and how they are laid out in Parquet.

``schema_version`` is ``major.minor`` in the footer. Readers accept their own major version; new columns are
nullable, appended, and selected by name. Null means "this task was not run"; an empty list "nothing found".
"""

import pyarrow as pa

from segbatch.errors import SchemaError

SCHEMA_VERSION = "1.3"
VERSION_KEY = b"segbatch.schema_version"
TABLE_KEY = b"segbatch.table"


def _list_of(*fields: pa.Field) -> pa.DataType:
    return pa.list_(pa.field("item", pa.struct(fields), nullable=False))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


RUNS = _list_of(_required("value", pa.uint16()), _required("length", pa.uint32()))
"""A label map as row-major runs of label ids; the lengths add up to height * width."""

PANOPTIC_RUNS = _list_of(_required("value", pa.uint32()), _required("length", pa.uint32()))
"""A panoptic map as runs: value n + 1 for the n-th entry of ``segments``, 0 for void."""

LABEL_MAPS = _list_of(_required("name", pa.string()), _required("runs", RUNS))
"""Further label maps of an image by name. New in 1.1."""

CLASS_PIXELS = _list_of(_required("value", pa.uint16()), _required("pixels", pa.uint64()))

BBOX = pa.list_(pa.field("item", pa.float64(), nullable=False), 4)

_INSTANCE = (
    _required("id", pa.int64()),
    _required("category_id", pa.int64()),
    _required("bbox_xywh", BBOX),
    _required("area", pa.float64()),
    _required("iscrowd", pa.bool_()),
    _required("counts", pa.large_binary()),
)
INSTANCES = _list_of(*_INSTANCE)
SCORED_INSTANCES = _list_of(*_INSTANCE, _required("score", pa.float64()))

SEGMENTS = _list_of(
    _required("id", pa.int64()),
    _required("category_id", pa.int64()),
    _required("area", pa.float64()),
    _required("bbox_xywh", BBOX),
    _required("iscrowd", pa.bool_()),
)

VOLUME = pa.struct(
    [
        pa.field("index", pa.int32()),
        pa.field("slices", pa.int32()),
        pa.field("spacing_mm", pa.list_(pa.float64(), 3)),
        pa.field("affine", pa.list_(pa.float64(), 16)),
        pa.field("slope", pa.float64()),
        pa.field("intercept", pa.float64()),
        pa.field("dtype", pa.string()),
        pa.field("header", pa.large_binary()),
    ]
)

ISSUES = _list_of(
    _required("code", pa.string()), _required("message", pa.string()), pa.field("annotation_id", pa.int64())
)

SAMPLES = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("image_format", pa.string()),
        _required("image_uri", pa.string()),
        _required("etag", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("channels", pa.int32()),
        pa.field("exif_orientation", pa.int32()),
        pa.field("semantic", RUNS),
        pa.field("class_pixels", CLASS_PIXELS),
        pa.field("instances", INSTANCES),
        pa.field("panoptic", PANOPTIC_RUNS),
        pa.field("segments", SEGMENTS),
        pa.field("volume", VOLUME),
        pa.field("attributes", pa.string()),
        _required("status", pa.string()),
        pa.field("issues", ISSUES),
        pa.field("label_maps", LABEL_MAPS),
    ]
)

MASKS = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("group_id", pa.string()),
        _required("image_uri", pa.string()),
        _required("etag", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        _required("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("semantic", RUNS),
        pa.field("class_pixels", CLASS_PIXELS),
        pa.field("instances", SCORED_INSTANCES),
        pa.field("panoptic", PANOPTIC_RUNS),
        pa.field("segments", SEGMENTS),
        pa.field(
            "confidence",
            pa.struct(
                [pa.field("height", pa.int32()), pa.field("width", pa.int32()), pa.field("png", pa.large_binary())]
            ),
        ),
        pa.field("class_confidence", _list_of(_required("value", pa.uint16()), _required("mean", pa.float64()))),
        _required("model_digest", pa.string()),
        pa.field("seconds_decode", pa.float64()),
        pa.field("seconds_model", pa.float64()),
        pa.field("seconds_encode", pa.float64()),
        pa.field("label_maps", LABEL_MAPS),
    ]
)

MATCHES = _list_of(_required("matched", pa.uint64()), _required("ignored", pa.uint64()))
"""Bits of every entry of ``detections``, by range of size and threshold. New in 1.2."""

ARRAYS = _list_of(
    _required("name", pa.string()),
    pa.field("integers", pa.list_(pa.field("item", pa.int64(), nullable=False))),
    pa.field("reals", pa.list_(pa.field("item", pa.float64(), nullable=False))),
)
"""Named arrays of numbers, row by row; see ``metrics.arrays``. New in 1.3."""

STATE = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("split", pa.string()),
        _required("image_uri", pa.string()),
        pa.field("attributes", pa.string()),
        _required("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field(
            "joint",
            _list_of(
                _required("truth", pa.uint16()), _required("predicted", pa.uint16()), _required("pixels", pa.uint64())
            ),
        ),
        pa.field("detections", _list_of(_required("category", pa.int32()), _required("score", pa.float64()))),
        pa.field("matches_segm", MATCHES),
        pa.field("matches_bbox", MATCHES),
        pa.field("objects", _list_of(_required("category", pa.int32()), _required("ranges", pa.uint64()))),
        pa.field("proposals", pa.list_(pa.field("item", pa.uint16(), nullable=False))),
        pa.field("segment_matches", _list_of(_required("category", pa.int32()), _required("iou", pa.float64()))),
        pa.field(
            "segment_errors",
            _list_of(_required("category", pa.int32()), _required("fp", pa.uint32()), _required("fn", pa.uint32())),
        ),
        pa.field("arrays", ARRAYS),
    ]
)
"""Evaluation state, one row per image; each protocol fills its own columns.

``joint`` is the sparse joint histogram of ground truth and prediction. ``detections`` to ``proposals`` are explained at
``metrics.coco_figures.Matches``, ``segment_matches`` and ``segment_errors`` at
``metrics.coco_panoptic.SegmentMatches``; these are new in 1.2. ``arrays`` holds the state of every
protocol for which no column of its own pays.
"""

SUMMARY = pa.schema(
    [
        _required("metric", pa.string()),
        _required("protocol", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        _required("slice", pa.string()),
        _required("class", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("support", pa.int64()),
    ]
)

IMAGES = pa.schema(
    [
        _required("sample_id", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("split", pa.string()),
        _required("image_uri", pa.string()),
        pa.field("attributes", pa.string()),
        _required("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("score", pa.float64()),
        pa.field(
            "classes",
            _list_of(
                _required("class", pa.string()),
                _required("label_id", pa.int32()),
                _required("tp", pa.uint64()),
                _required("fp", pa.uint64()),
                _required("fn", pa.uint64()),
                pa.field("iou", pa.float64()),
            ),
        ),
        pa.field(
            "matches",
            _list_of(
                _required("class", pa.string()),
                _required("label_id", pa.int32()),
                pa.field("truth_id", pa.int64()),
                pa.field("predicted_id", pa.int64()),
                pa.field("iou", pa.float64()),
                pa.field("score", pa.float64()),
                _required("outcome", pa.string()),
            ),
        ),
    ]
)
"""One row per image: its own score (null where undefined) and the counts of every class it shows or predicts.

``matches`` says of every object and detection what became of it (``tp``, ``fp``, ``fn``, ``ignored``); null where the
protocol does not match objects. New in 1.3.
"""

DETAILS = pa.schema(
    [
        _required("kind", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("sample_id", pa.string()),
        pa.field("class", pa.string()),
        pa.field("predicted_class", pa.string()),
        pa.field("truth_id", pa.int64()),
        pa.field("predicted_id", pa.int64()),
        _required("values", pa.map_(pa.string(), pa.field("value", pa.float64()))),
    ]
)
"""What a protocol has to say of smaller things than images' classes, or larger: cases, lesions, pairs. New in 1.3."""

CONFUSION = pa.schema(
    [
        _required("truth", pa.string()),
        _required("predicted", pa.string()),
        _required("truth_id", pa.int32()),
        _required("predicted_id", pa.int32()),
        _required("pixels", pa.uint64()),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "samples": SAMPLES,
    "masks": MASKS,
    "state": STATE,
    "summary": SUMMARY,
    "images": IMAGES,
    "confusion": CONFUSION,
    "details": DETAILS,
}

ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 64 << 20


def stamped(table: str) -> pa.Schema:
    """The schema of ``table`` with its name and version in the footer metadata."""
    return TABLES[table].with_metadata({TABLE_KEY: table.encode(), VERSION_KEY: SCHEMA_VERSION.encode()})


def version_of(schema: pa.Schema) -> str:
    """The schema version that a file was written by; empty where it says none."""
    version: str = (schema.metadata or {}).get(VERSION_KEY, b"").decode()
    return version


def check_version(table: str, schema: pa.Schema, uri: str) -> None:
    """Refuse a file that is not ``table`` or has another major version.

    Raises:
        SchemaError: with the file, what it is and what was expected.
    """
    found = (schema.metadata or {}).get(TABLE_KEY, b"").decode()
    version = version_of(schema)
    if found != table:
        raise SchemaError(
            f"{uri} holds {found or 'no segbatch table'}, not {table}", "check the order of the arguments"
        )
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise SchemaError(
            f"{uri} has {table} schema version {version}, this segbatch reads {SCHEMA_VERSION.split('.')[0]}.x",
            "use the segbatch version that wrote it, or write it anew",
        )


def parquet_options(table: str) -> dict[str, object]:
    """Arguments for ``pyarrow.parquet.ParquetWriter``: zstd-3, byte-stream-split runs, raw image bytes, page checksums.

    The checksums are Parquet's own, a CRC-32 of each page (``PageHeader.crc`` in parquet-format's ``parquet.thrift``).
    Measured on CamVid: 3.9 kB a label map where PNG takes 6.0.
    """
    leaves = _leaf_paths(TABLES[table])
    splittable = {pa.uint16(), pa.uint32(), pa.uint64(), pa.float64(), pa.int64()}
    uncompressed = {"image", "confidence.png"}
    bulky = {"image", "confidence.png", "volume.header"} | {p for p, _ in leaves if p.endswith(".counts")}
    split = [p for p, t in leaves if ".list." in p and t in splittable and "label_id" not in p]
    return {
        "compression": {p: "none" if p in uncompressed else "zstd" for p, _ in leaves},
        "compression_level": {p: 3 for p, _ in leaves if p not in uncompressed},
        "use_dictionary": [p for p, t in leaves if pa.types.is_string(t)],
        "write_statistics": [p for p, _ in leaves if p not in bulky],  # a least and a greatest photo help nobody
        "column_encoding": dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        "write_page_checksum": True,
    }


def _leaf_paths(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    """Parquet's dotted column paths of every leaf, with the Arrow type."""

    def walk(path: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
        if pa.types.is_struct(kind):
            return [leaf for f in kind for leaf in walk(f"{path}.{f.name}", f.type)]
        if pa.types.is_map(kind):
            return walk(f"{path}.key_value.key", kind.key_type) + walk(f"{path}.key_value.value", kind.item_type)
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            return walk(f"{path}.list.element", kind.value_type)  # Parquet's own name, whatever Arrow's is
        return [(path, kind)]

    return [leaf for f in schema for leaf in walk(f.name, f.type)]
