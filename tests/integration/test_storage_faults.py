"""What stores and networks do on bad days, by a proxy before the S3 server: nothing is lost, and no wait is endless."""

import base64
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import doubles
import photos
import pytest
import s3
from s3_proxy import Hide, Lose, Proxy, Refuse, Reset, Rule, Silence, Slow, Truncate, proxy

from segbatch import api, storage
from segbatch.config import EngineConfig, PlanConfig, RunOptions
from segbatch.errors import IncompleteRunError, ObjectExists, StorageError, TransientStorageError
from segbatch.jobs import RunResult
from segbatch.runs import Run
from segbatch.storage import patience, probe, remote
from segbatch.storage import s3 as s3_store

pytestmark = pytest.mark.s3

ALWAYS = 1_000_000
KEY = f"s3://{s3.BUCKET}/bad-days/"


@pytest.fixture
def between(s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy that this process's requests go through."""
    with proxy(s3_server.url) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        monkeypatch.setattr(patience, "_BACK_OFF_S", 0.05)
        forget()
        yield found
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As if this process had not used any store yet."""
    storage._remote.cache_clear()
    probe._kept.cache_clear()


def upload(name: str, count: int, size: int = 20_000) -> dict[str, bytes]:
    """Objects of different content below a prefix of the test's own."""
    made = {f"{KEY}{name}/{i:03d}": bytes([i % 256]) * size for i in range(count)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.replace, made, made.values()))
    return made


# -- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Reset(), Truncate(), Lose(), Refuse(500, "InternalError"), Refuse()])
def test_a_read_is_repeated(fault: Reset | Truncate | Lose | Refuse, between: Proxy) -> None:
    made = upload("repeated", 1)
    (uri, data) = next(iter(made.items()))
    between.rules = [Rule(fault, "GET", "repeated", times=2)]
    assert storage.read_bytes(uri) == data
    assert len(between.hit) == 2
    between.rules = [Rule(fault, "GET", "repeated", times=2)]
    with storage.open_input(uri) as file:
        assert file.read() == data


def test_throttling_is_waited_out(between: Proxy) -> None:
    """More refusals than there are attempts: a store that asks for fewer requests is not down."""
    made = upload("throttled", 4)
    between.rules = [Rule(Refuse(), "GET", "throttled", times=4 * storage.ATTEMPTS)]
    assert storage.read_many(made) == list(made.values())
    assert len(between.hit) == 4 * storage.ATTEMPTS


def test_many_faults_at_once(between: Proxy) -> None:
    made = upload("many", 60)
    shares = (Reset(), 0.1), (Truncate(), 0.1), (Refuse(), 0.1), (Slow(0.05), 0.2)
    between.rules = [Rule(fault, "", "many", ALWAYS, share) for fault, share in shares]
    assert storage.read_many(made) == list(made.values())
    assert [i.uri for i in storage.list_files(f"{KEY}many")] == list(made)
    assert len(between.hit) > 10


def test_a_dead_call_holds_no_other(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGBATCH_STORAGE_READ_S", "1.5")
    monkeypatch.setenv("SEGBATCH_STORAGE_TOTAL_S", "6")
    forget()
    made = upload("dead", 12)
    between.rules = [Rule(Silence(20), "GET", "dead/003", ALWAYS)]
    began = time.monotonic()
    ended: dict[str, float] = {}
    failed: list[StorageError] = []

    def read(uri: str) -> None:
        try:
            assert storage.read_bytes(uri) == made[uri]
        except StorageError as error:
            failed.append(error)
        ended[uri] = time.monotonic() - began

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, made))
    dead = ended.pop(f"{KEY}dead/003")
    assert max(ended.values()) < dead < 15
    assert [type(error) for error in failed] == [TransientStorageError] and "dead/003" in str(failed[0])


def test_a_store_that_is_away_is_left_alone(
    between: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "_OUTAGE_S", 1.0)
    monkeypatch.setattr(patience, "_FIRST_REST_S", 0.3)
    monkeypatch.setattr(patience, "_LONGEST_REST_S", 0.6)
    made = upload("away", 3)
    between.rules = [Rule(Reset(), "", "", ALWAYS)]
    between.asked.clear()

    def read(uri: str) -> str:
        try:
            storage.read_bytes(uri)
        except TransientStorageError as error:
            return str(error)
        return ""

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(read, list(made) * 40))
    assert all(said) and any("has not answered for a while" in text for text in said)
    assert time.monotonic() - began < 20
    assert len(between.asked) < 60  # 600 without a breaker
    assert sum("does not answer" in r.message for r in caplog.records) == 1
    between.rules = []
    time.sleep(0.7)
    assert storage.read_many(made) == list(made.values())
    assert any("answers again" in r.message for r in caplog.records)


def test_a_store_that_comes_back_soon_costs_no_call(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the breaker is done when the probe gets through."""
    monkeypatch.setattr(patience, "_TRIP_AFTER", 3)
    made = upload("back", 16)
    between.rules = [Rule(Reset(), "GET", "back/", times=8)]
    assert storage.read_many(made) == list(made.values())


# -- keys and clocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403])
def test_renewed_keys_are_taken_up(
    status: int, between: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = upload("expired", 4)
    keys = tmp_path / "credentials"

    def write(key_id: str) -> None:
        (tmp_path / "new").write_text(
            f"[default]\naws_access_key_id={key_id}\naws_secret_access_key={s3.SECRET}\naws_session_token=token\n"
        )
        os.replace(tmp_path / "new", keys)

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setattr(patience, "_BACK_OFF_S", 2.0)
    monkeypatch.setattr(remote, "_RENEW_AFTER_S", 0.0)
    write("OLD")
    forget()
    between.rules = [Rule(Refuse(status, "ExpiredToken"), "", "expired", ALWAYS, key_id="OLD/")]
    timer = threading.Timer(0.2, write, ("NEW",))
    timer.start()
    assert storage.read_many(made) == list(made.values())
    timer.join()
    assert any("GET" in hit for hit in between.hit)
    assert {k.lower(): v for k, v in between.headers["GET"].items()}["x-amz-security-token"] == "token"
    write("OLD")
    forget()
    storage.store(KEY)  # opened with the old keys
    between.hit.clear()
    write("NEW")
    assert storage.stat(next(iter(made))) is not None  # HEAD does not say that keys have expired


def test_keys_that_stay_expired(between: Proxy) -> None:
    between.rules = [Rule(Refuse(403, "ExpiredToken"), "", "", ALWAYS)]
    with pytest.raises(StorageError, match=r"the keys have expired \(renew them") as caught:
        storage.read_bytes(f"{KEY}x")
    assert s3.SECRET not in str(caught.value)


@pytest.mark.parametrize("call", [storage.read_bytes, storage.stat])
def test_a_wrong_clock_is_named(call: Callable[[str], object], between: Proxy) -> None:
    """The reply to HEAD has no text: the store's time tells."""
    between.rules = [Rule(Refuse(403, "RequestTimeTooSkewed", away_s=7200), "", "", ALWAYS)]
    with pytest.raises(StorageError, match=r"clock is wrong: it says .* UTC, the store's .* \(set the clock") as caught:
        call(f"{KEY}x")
    assert not caught.value.retryable
    between.rules = [Rule(Refuse(403, "AccessDenied"), "", "", ALWAYS)]
    with pytest.raises(StorageError, match="permission denied"):
        call(f"{KEY}x")


# -- uploads in parts ------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """Uploads in parts begin at 6 MB."""
    monkeypatch.setattr(s3_store, "_IN_PARTS_FROM", 6 << 20)
    monkeypatch.setattr(s3_store, "_PART", 5 << 20)
    return between


def uploads_left() -> list[object]:
    filesystem = storage.store(KEY).filesystem
    return list(filesystem.call_s3("list_multipart_uploads", Bucket=s3.BUCKET).get("Uploads", []))


def test_of_many_uploads_in_parts_one_creates(parts: Proxy) -> None:
    root = f"{KEY}parts"
    assert storage.check_writable(root) == storage.Guarantee(put_if_absent=True, in_parts=True)
    key, won = f"{root}/masks/part-0.parquet", []

    def create(number: int) -> None:
        try:
            storage.create(key, bytes([number]) * (7 << 20))
            won.append(number)
        except ObjectExists:
            return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(4)))
    assert len(won) == 1
    assert storage.read_bytes(key) == bytes([won[0]]) * (7 << 20)
    assert any("partNumber=2" in a for a in parts.asked) and uploads_left() == []


@pytest.mark.parametrize("fault", [Lose(), Reset(), Refuse()])
def test_faults_during_an_upload_in_parts(fault: Lose | Reset | Refuse, parts: Proxy) -> None:
    root = f"{KEY}parts-{type(fault).__name__}"
    storage.check_writable(root)
    data = os.urandom(1 << 20) * 11
    parts.rules = [
        Rule(fault, method, word, times=1) for method, word in (("PUT", "partNumber=2"), ("POST", "uploadId="))
    ]
    try:
        storage.create(f"{root}/masks/part-1.parquet", data)
    except ObjectExists:
        assert isinstance(fault, Lose)
    assert len(parts.hit) == 2
    assert storage.read_bytes(f"{root}/masks/part-1.parquet") == data
    assert uploads_left() == []


def test_one_put_where_completion_takes_no_condition(parts: Proxy) -> None:
    parts.ignored = {"POST": ("if-none-match",)}
    root = f"{KEY}one-put"
    assert not storage.check_writable(root).in_parts
    storage.create(f"{root}/masks/part-0.parquet", bytes(7 << 20))
    assert not any("partNumber" in a and "part-0" in a for a in parts.asked)
    with pytest.raises(ObjectExists):
        storage.create(f"{root}/masks/part-0.parquet", bytes(7 << 20))


def test_one_put_where_completion_refuses_a_condition(parts: Proxy) -> None:
    parts.rules = [Rule(Refuse(501, "NotImplemented"), "POST", "uploadId=", times=20)]
    assert storage.check_writable(f"{KEY}refuses") == storage.Guarantee(put_if_absent=True, in_parts=False)


def test_an_upload_that_somebody_else_ended_is_no_success(parts: Proxy) -> None:
    uri = f"{KEY}ended"
    storage.replace(uri, b"old")
    parts.rules = [Rule(Refuse(404, "NoSuchUpload"), "POST", "uploadId=", times=1)]
    with pytest.raises(TransientStorageError, match="was ended by somebody else"):
        storage.replace(uri, bytes(7 << 20))
    assert storage.read_bytes(uri) == b"old"
    storage.replace(uri, bytes(7 << 20))
    assert storage.read_bytes(uri) == bytes(7 << 20)


# -- stores without put-if-absent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ignores", "refuses"])
def test_a_store_without_put_if_absent(
    kind: str, between: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = photos.folder(tmp_path, 12), f"{KEY}weak-{kind}"
    if kind == "ignores":
        between.ignored = {"PUT": ("if-none-match",), "POST": ("if-none-match",)}
    else:
        between.rules = [Rule(Refuse(501, "NotImplemented"), "PUT", "probe-")]
    result = predict(source, out)
    assert result.state.complete and result.state.rows_done == 12
    warned = [r.message for r in caplog.records if "put-if-absent" in r.getMessage()]
    assert len(warned) == 1 and "\n" not in warned[0] and "run one at a time" in warned[0]
    forget()  # another process
    key = f"{out}/masks/part-0.parquet"
    storage.create(key, b"one")
    assert "If-None-Match" not in between.headers["PUT"]
    with pytest.raises(ObjectExists):
        storage.create(key, b"two")
    assert storage.read_bytes(key) == b"one"


# -- runs ------------------------------------------------------------------------------------------------------------


def predict(source: Path, out: str) -> RunResult:
    """A free model in this process, eight photos a shard."""
    options = RunOptions(plan=PlanConfig(shard_rows=8), engine=EngineConfig(kind="inline"))
    return api.predict(doubles.FreeModel(), str(source), out, batch_size=2, options=options)


def rows_of(out: str) -> list[str]:
    return [r["sample_id"] for r in api.query(out, "SELECT sample_id FROM masks ORDER BY 1").to_pylist()]


def test_a_run_on_a_bad_day(between: Proxy, tmp_path: Path) -> None:
    source, out = photos.folder(tmp_path, 24), f"{KEY}bad-day"
    shares = (Reset(), 0.05), (Truncate(), 0.05), (Lose(), 0.05), (Refuse(), 0.1), (Refuse(500, "InternalError"), 0.05)
    between.rules = [Rule(fault, "", "bad-day", ALWAYS, share) for fault, share in shares]
    began = time.monotonic()
    result = predict(source, out)
    assert time.monotonic() - began < 60
    assert len(between.hit) >= 10
    assert result.state.complete and result.state.rows_done == 24
    between.rules = []
    assert rows_of(out) == sorted(photos.sample_ids(source))
    assert predict(source, out).rows == 0


@pytest.mark.parametrize("times", [1, 3])
def test_listings_that_lag_behind(times: int, between: Proxy, tmp_path: Path) -> None:
    """A shard that a listing lacks is looked for again, never written twice, and counted once."""
    source, out = photos.folder(tmp_path, 24), f"{KEY}lagging-{times}"
    predict(source, out)
    before = {i.uri: i.etag for i in storage.list_files(f"{out}/masks")}
    assert len(before) > 1
    between.rules = [Rule(Hide("part-00000001"), "GET", "masks%2F", times=times)]
    for _ in range(times):
        with contextlib.suppress(IncompleteRunError):  # says that shard 1 is missing
            predict(source, out)
    result = predict(source, out)
    assert result.state.complete and result.state.rows_done == 24
    assert {i.uri: i.etag for i in storage.list_files(f"{out}/masks")} == before
    assert rows_of(out) == sorted(photos.sample_ids(source))
    assert Run(out, "masks").state().complete


# -- settings --------------------------------------------------------------------------------------------------------


def test_settings_reach_the_requests(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"REQUESTER_PAYS": "1", "SSE": "aws:kms", "SSE_KMS_KEY_ID": "my-key", "PATH_STYLE": "yes"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SEGBATCH_S3_{name}", value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    forget()
    storage.replace(f"{KEY}settings", b"1")
    assert storage.read_bytes(f"{KEY}settings") == b"1"
    sent = {k.lower(): v for k, v in between.headers["PUT"].items()}
    assert sent["x-amz-request-payer"] == "requester" and sent["x-amz-server-side-encryption"] == "aws:kms"
    assert sent["x-amz-server-side-encryption-aws-kms-key-id"] == "my-key"
    assert sent["x-amz-security-token"] == "the-token"
    asked = {k.lower(): v for k, v in between.headers["GET"].items()}
    assert asked["x-amz-request-payer"] == "requester" and "x-amz-server-side-encryption" not in asked
    assert between.asked[-1].startswith(f"GET /{s3.BUCKET}/")


def test_a_key_of_ones_own_is_sent_as_it_is(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most keys have bytes above 127."""
    key = base64.b64encode(bytes(range(200, 232))).decode()
    monkeypatch.setenv("SEGBATCH_S3_SSE_C_KEY", key)
    forget()
    storage.replace(f"{KEY}own-key", b"1")
    sent = {k.lower(): v for k, v in between.headers["PUT"].items()}
    assert sent["x-amz-server-side-encryption-customer-key"] == key
    digest = base64.b64encode(hashlib.md5(base64.b64decode(key)).digest()).decode()
    assert sent["x-amz-server-side-encryption-customer-key-md5"] == digest


def test_public_buckets_without_keys(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    upload("public", 1)
    monkeypatch.setenv("SEGBATCH_S3_ANONYMOUS", "1")
    forget()
    between.rules = [Rule(Refuse(403, "AccessDenied"), "GET", "public")]  # the test server has no public buckets
    with pytest.raises(StorageError, match="permission denied"):
        storage.read_bytes(f"{KEY}public/000")
    assert "Authorization" not in between.headers["GET"]
