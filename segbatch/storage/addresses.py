"""URIs, and what a listing says of an object."""

import os
from dataclasses import dataclass
from pathlib import Path

from segbatch import archives
from segbatch.errors import StorageError


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A listed object: its URI, its version tag (store's etag, else size and mtime) and its size in bytes."""

    uri: str
    etag: str
    size: int


def resolve(uri: str) -> str:
    """Absolute form of a URI: local paths become absolute, ``file://`` is dropped, no trailing slash.

    The root of an archive is ``ARCHIVE!/``, with the slash.
    """
    member = archives.split(uri)
    if member:
        return archives.address(resolve(member[0]), archives.normal(member[1]))
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if is_local(uri):
        return str(Path(os.path.abspath(os.path.expanduser(uri))))
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine; what is inside an archive is not."""
    return "://" not in uri and not archives.split(uri)


def is_private(uri: str) -> bool:
    """Whether only this process can read the URI (``memory://``), so that no worker elsewhere can."""
    member = archives.split(uri)
    return (member[0] if member else uri).startswith("memory://")


def is_http(uri: str) -> bool:
    """Whether the URI is a web address."""
    return uri.startswith(("http://", "https://"))


def is_archive(uri: str) -> bool:
    """Whether the URI names an archive: by its ending, and a local folder is none. Nothing remote is asked.

    Archives of kinds that cannot be read (``.tar.xz``, ``.7z``, ...) count too: opening them says what to do.
    """
    if archives.split(uri) or not archives.is_named_like_one(uri):
        return False
    return not (is_local(uri) and os.path.isdir(uri))


def archive_root(uri: str) -> str:
    """URI of the folder that an archive's content is: ``ARCHIVE!/``."""
    return archives.address(uri)


def join(root: str, *parts: str) -> str:
    """Child of ``root``."""
    return "/".join([root.rstrip("/"), *(p.strip("/") for p in parts)])


def name_of(uri: str) -> str:
    """Last component of a URI; the root of an archive is named like the archive."""
    return uri.rstrip("/").removesuffix("!").rsplit("/", 1)[-1]


def relative(uri: str, root: str) -> str:
    """Path of ``uri`` below ``root``."""
    return uri.removeprefix(root.rstrip("/") + "/")


def scheme_of(uri: str) -> str:
    """What stands before ``://``."""
    return uri.partition("://")[0]


def store_of(uri: str) -> str:
    """The bucket or host that a remote URI belongs to: ``s3://bucket``."""
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"


def check_is_no_member(uri: str) -> None:
    """Refuse to write into an archive."""
    if archives.split(uri):
        raise StorageError(f"cannot write {uri}: archives are only read", "choose a folder or a bucket")
