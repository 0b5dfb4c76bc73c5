"""What a store guarantees to those who write at the same time: tried once per run root, and kept in it."""

import contextlib
import functools
import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass

from segbatch.errors import ObjectExists, ObjectMissing, StorageError
from segbatch.storage import failures, local, remote
from segbatch.storage.addresses import check_is_no_member, is_local, join, name_of
from segbatch.storage.patience import attempt
from segbatch.storage.s3 import S3Store

_SERVICE = ".segbatch"
_KEPT = "store.json"
_PART = "part-"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What was found.

    Attributes:
        put_if_absent: of any number of writers exactly one succeeds.
        in_parts: so it is for uploads in parts.
    """

    put_if_absent: bool = True
    in_parts: bool = False

    @property
    def weakness(self) -> str:
        """What is weaker than it should be, in a sentence; empty where nothing is."""
        if self.put_if_absent:
            return ""
        return (
            "ignores put-if-absent (If-None-Match): a shard still has one file, but of two drivers that start at the "
            "same moment both may plan; run one at a time"
        )


def probe(root: str) -> Guarantee:
    """Try to write below ``root``; nothing is left there.

    Raises:
        StorageError: it cannot be written, or is a local folder without put-if-absent.
    """
    check_is_no_member(root)
    key = join(root, _SERVICE, f"probe-{uuid.uuid4().hex}")
    try:
        return _probe_local(key, root) if is_local(root) else _probe_remote(key)
    finally:
        with contextlib.suppress(StorageError):
            _delete(key)


def _delete(key: str) -> None:
    if is_local(key):
        attempt(lambda: os.unlink(key), key, "delete")
    else:
        remote.store(key).delete(key)


def _probe_local(key: str, root: str) -> Guarantee:
    attempt(lambda: local.create(key, b"1"), key, "write")
    try:
        attempt(lambda: local.create(key, b"2"), key, "write")
    except ObjectExists:
        return Guarantee(in_parts=True)
    raise StorageError(
        f"{root} ignores put-if-absent: two writers could both succeed", "choose a folder on another filesystem"
    )


def _probe_remote(key: str) -> Guarantee:
    store = remote.store(key)
    try:
        with contextlib.suppress(ObjectExists):  # nobody else knows the name: only the reply was lost
            store.create(key, b"1")
    except StorageError as error:
        if error.__cause__ is None or not failures.is_unknown_header(error.__cause__):
            raise
        store.replace(key, b"1", None)
        return Guarantee(put_if_absent=False)
    if not _is_refused(lambda: store.create(key, b"2")):
        return Guarantee(put_if_absent=False)
    if not isinstance(store, S3Store):
        return Guarantee(in_parts=True)
    condition = {"IfNoneMatch": "*"}
    try:
        in_parts = _is_refused(lambda: store.wait(store.put_in_parts(key, b"3", condition)))
    except StorageError as error:
        if error.__cause__ is None or not failures.is_unknown_header(error.__cause__):
            raise
        in_parts = False
    return Guarantee(in_parts=in_parts)


def _is_refused(write: Callable[[], None]) -> bool:
    try:
        write()
    except ObjectExists:
        return True
    return False


def keep(root: str, found: Guarantee) -> None:
    """Note in the run root what was found, for every other process."""
    uri = join(root, _SERVICE, _KEPT)
    remote.store(uri).replace(uri, json.dumps(asdict(found)).encode(), None)
    _kept.cache_clear()
    if found.weakness:
        log.warning("%s %s", root, found.weakness)


def of(uri: str) -> Guarantee:
    """What is known of the store of a run's file; the usual where the file is no run's, or nobody has tried."""
    root = _root_of(uri)
    return _kept(root) if root else Guarantee()


def _root_of(uri: str) -> str:
    """Root of the run that a file belongs to: ``ROOT/.segbatch/...`` or ``ROOT/<table>/part-...``; else nothing."""
    root, service, _ = uri.partition(f"/{_SERVICE}/")
    if service:
        return root
    return uri.rsplit("/", 2)[0] if name_of(uri).startswith(_PART) else ""


@functools.lru_cache(64)
def _kept(root: str) -> Guarantee:
    uri = join(root, _SERVICE, _KEPT)
    try:
        found = json.loads(remote.store(uri).read(uri))
        return Guarantee(bool(found["put_if_absent"]), bool(found["in_parts"]))
    except ObjectMissing:
        return Guarantee()
