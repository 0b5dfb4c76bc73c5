"""What the errors of the operating system, botocore, aiohttp and the other drivers mean, and what to do about them."""

import datetime
import email.utils
import errno
import os

from segbatch.errors import ObjectExists, ObjectMissing, SegbatchError, StorageError, TransientStorageError
from segbatch.storage.addresses import is_http, is_local

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_MAX_SKEW_S = 900.0  # AWS refuses requests whose time differs by more
_AGAIN = "run the same command again"

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429"}
_DAMAGED_ON_THE_WAY = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_UNKNOWN_HEADER = {"NotImplemented", "501"}

_TRANSIENT = {
    "ClientError",  # aiohttp's; botocore's has a status
    "HTTPClientError",
    "ConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "EndpointConnectionError",
    "ClientConnectionError",
    "FSTimeoutError",
    "IncompleteReadError",
    "ResponseParserError",
}


def translate(error: Exception, uri: str, doing: str) -> SegbatchError:
    """The library's exception as one of ours, with what to do about it."""
    if is_http(uri) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec calls every failure "not found"
    code, status = getattr(error, "errno", None), http_status(error)
    if isinstance(error, FileNotFoundError) or (is_http(uri) and status == 404):
        what = "the bucket" if "bucket does not exist" in str(error) else "it"
        return ObjectMissing(f"cannot {doing} {uri}: {what} does not exist", "check the path or URL")
    name = type(error).__name__
    if name == "FileExpired" or (status == 412 and doing == "read"):
        return changed(uri)
    if isinstance(error, FileExistsError) or status == 412:
        return ObjectExists(f"{uri} exists already")
    if code in _FULL:
        return disk_full(f"cannot {doing} {uri}", code, os.path.dirname(uri) if is_local(uri) else "")
    if skew := _skew(error):
        return StorageError(f"cannot {doing} {uri}: {skew}", "set the clock (chrony, systemd-timesyncd or ntpd)")
    if is_expired(error):
        return TransientStorageError(
            f"cannot {doing} {uri}: the keys have expired",
            "renew them (AWS_SESSION_TOKEN and its keys, or the credentials file), then " + _AGAIN,
        )
    if isinstance(error, PermissionError) or code in (errno.EROFS, errno.EACCES) or status in (401, 403):
        return StorageError(
            f"cannot {doing} {uri}: permission denied", "choose a place you may use, or mend its permissions or keys"
        )
    if isinstance(error, (NotADirectoryError, IsADirectoryError)):
        return StorageError(
            f"cannot {doing} {uri}: {os.strerror(code or errno.ENOTDIR)}", "a file is in the way; choose another path"
        )
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"cannot {doing} {uri}: no credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, ValueError) and "range requests" in str(error):
        return no_parts(uri)
    if is_transient(error):
        return TransientStorageError(
            f"cannot {doing} {uri}: {name}: {error}", "the store may be down; run the same command again later"
        )
    return StorageError(f"cannot {doing} {uri}: {name}: {error}", "see the message of the store")


def changed(uri: str) -> StorageError:
    """Transient: it is no fault of the samples in it, which the next run lists and reads anew."""
    return TransientStorageError(f"{uri} has changed since it was listed or opened", _AGAIN)


def no_parts(uri: str) -> StorageError:
    """A server without range requests."""
    return StorageError(f"cannot read {uri}: the server does not serve parts of a file", "download it first")


def cut_short(uri: str, came: int, wanted: int) -> TransientStorageError:
    """A reply that ended early without an error of the connection."""
    return TransientStorageError(f"cannot read {uri}: {came} bytes came instead of {wanted}", _AGAIN)


def disk_full(what: str, code: int, folder: str) -> StorageError:
    """No space, a file limit or a quota; ``folder`` is where."""
    where = f" in {folder}" if folder else ""
    return StorageError(
        f"{what}: {os.strerror(code)}{where}", "free space or raise the limit, then run the same command again"
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or DuckDB's share of the disk is full."""
    text = str(error)
    return getattr(error, "errno", None) in _FULL or "No space left" in text or "max_temp_directory_size" in text


def http_status(error: BaseException) -> int:
    """Status of the reply behind an exception of botocore, s3fs, aiohttp, gcsfs or azure; 0 where there is none."""
    for name in ("status", "status_code", "code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    status = _reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def _reply(error: BaseException) -> dict[str, dict[str, object]]:
    """botocore's parsed reply; empty where there is none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _code(error: BaseException) -> str:
    """S3's own name of an error; the status in digits where the reply has no body (HEAD)."""
    return str(_reply(error).get("Error", {}).get("Code", ""))


def is_expired(error: BaseException) -> bool:
    """Whether the keys were good once."""
    return _code(error) in _EXPIRED


def may_be_expired(error: BaseException) -> bool:
    """Whether the keys may have been good once: the reply to HEAD does not say why it refuses."""
    return is_expired(error) or _code(error) in ("400", "403")


def is_throttled(error: BaseException) -> bool:
    """Whether the store is well and asks for fewer requests."""
    return _code(error) in _THROTTLED or http_status(error) == 429


def is_unknown_header(error: BaseException) -> bool:
    """Whether the store knows no conditional writes and says so."""
    return _code(error) in _UNKNOWN_HEADER or http_status(error) == 501


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, (TimeoutError, ConnectionError)) or _code(error) in _DAMAGED_ON_THE_WAY | _EXPIRED:
        return True
    status = http_status(error)
    if status:
        return (status >= 500 and status != 501) or status in (408, 409, 429)
    code = getattr(error, "errno", None)
    names = {c.__name__ for c in type(error).__mro__}
    return bool(names & _TRANSIENT) or code in (errno.EIO, errno.EBUSY, errno.ESTALE)


def _skew(error: BaseException) -> str:
    """What is wrong with this machine's clock, if it is why a store refused; else nothing."""
    if _code(error) not in _SKEWED and http_status(error) != 403:
        return ""
    now = datetime.datetime.now(datetime.UTC)
    headers = _reply(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    there = _http_date(headers.get("date", "") if isinstance(headers, dict) else "")
    off = (now - there).total_seconds() if there else 0.0
    if _code(error) not in _SKEWED and abs(off) <= _MAX_SKEW_S:
        return ""
    says = f", the store's {there:%Y-%m-%d %H:%M:%S}" if there else ""
    return f"this machine's clock is wrong: it says {now:%Y-%m-%d %H:%M:%S} UTC{says}"


def _http_date(text: str) -> datetime.datetime | None:
    try:
        return email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
