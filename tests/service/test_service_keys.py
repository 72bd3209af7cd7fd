"""Access control: keys and their scopes, addresses, TLS and client certificates."""

from __future__ import annotations

import hashlib
import logging
import ssl
import time

import numpy as np
import pytest
import tritonclient.http as triton
import trustme
from click.testing import CliRunner
from serving import START_SECONDS, serve
from test_service_process import command
from tritonclient.utils import InferenceServerException

from batchnorm_service.__main__ import main
from batchnorm_service.errors import ForbiddenError, UnauthorizedError
from batchnorm_service.http.paths import classify
from batchnorm_service.keys import SCOPES, Keyring, new_key, parse

PATHS = {
    "infer": ("POST", "/v2/models/planar/infer"),
    "metadata": ("GET", "/v2/models/planar"),
    "control": ("POST", "/v2/repository/models/planar/load"),
}


def line_of(scopes: str, key: str, comment: str = "") -> str:
    return f"{scopes}:{hashlib.sha256(key.encode()).hexdigest()}{comment}\n"


# The file of keys


def test_a_new_key_opens_what_it_says():
    keys = dict(new_key(scopes) for scopes in ("infer", "infer,metadata"))
    (first, line), (second, _) = keys.items()
    assert len({first, second}) == 2
    assert len(first) >= 43  # 256 bits in base 64
    assert first not in line
    (key,) = parse(line)
    assert (key.scopes, key.digest) == ({"infer"}, hashlib.sha256(first.encode()).digest())
    with pytest.raises(ValueError, match="infer, metadata, control, got 'all'"):
        new_key("all")


def test_lines():
    digest = hashlib.sha256(b"k").hexdigest()
    text = f"# comment\n\ninfer:{digest}\n control,infer:{digest.upper()}:of Ada: laptop \n"
    assert [sorted(key.scopes) for key in parse(text)] == [["infer"], ["control", "infer"]]
    for bad in ("infer", "infer:", "infer:abc", f"all:{digest}", f":{digest}", f"infer {digest}", digest):
        with pytest.raises(ValueError, match=r"^line 2: "):
            parse(f"infer:{digest}\n{bad}\n")


def test_a_keyring_follows_its_file(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(line_of("infer", "old"))
    keyring = Keyring(path)
    keyring.check(b"old", "infer")
    with pytest.raises(ForbiddenError, match="scope control"):
        keyring.check(b"old", "control")
    for unknown in (None, b"", b"new", b"ol", b"\xff"):
        with pytest.raises(UnauthorizedError):
            keyring.check(unknown, "infer")
    path.write_text(line_of("infer", "new") + line_of("control", "old"))
    keyring.check(b"old", "infer")
    with caplog.at_level(logging.INFO):
        keyring.refresh()
    assert "read 2 keys" in caplog.text
    keyring.check(b"new", "infer")
    keyring.check(b"old", "control")
    path.write_text("nonsense\n")
    keyring.refresh()
    keyring.refresh()
    assert caplog.text.count("the keys are kept as they were: line 1: ") == 1
    path.unlink()
    keyring.refresh()
    keyring.check(b"new", "infer")
    path.write_text("# nobody\n")
    keyring.refresh()
    with pytest.raises(UnauthorizedError):
        keyring.check(b"new", "infer")


@pytest.mark.parametrize(
    ("request_", "scope"),
    [
        ("POST /v2/models/a/infer", "infer"),
        ("POST /v2/models/a/versions/1/infer", "infer"),
        ("POST /v2/models/infer/infer", "infer"),
        ("GET /v2/models/infer", "metadata"),
        ("GET /v2/models/infer/ready", "metadata"),
        ("HEAD /v2/models/a/versions/infer", "metadata"),
        ("GET /v2/models/a", "metadata"),
        ("GET /v2/models/stats", "metadata"),
        ("GET /metrics", "metadata"),
        ("GET /docs", "metadata"),
        ("POST /v2/repository/index", "metadata"),
        ("POST /v2/repository/elsewhere/index", "metadata"),
        ("POST /v2/repository/models/a/load", "control"),
        ("POST /v2/repository/models/index/load", "control"),
        ("POST /v2/repository/models/a/unload", "control"),
        ("POST /v2/repository/elsewhere/models/a/load", "control"),
        ("PUT /v2/repository/models/a", "control"),
        ("GET /nowhere", "metadata"),
        ("GET /v2/health/live", None),
        ("HEAD /v2/health/ready", None),
        ("GET /v2/health/live/", "metadata"),
    ],
)
def test_scopes_of_requests(request_, scope):
    assert classify(*request_.split()).scope == scope


# A process


def test_keys_of_a_process(models, tmp_path):
    path = tmp_path / "keys"
    path.write_text("".join(line_of(scope, f"key of {scope}") for scope in SCOPES))
    with serve(tmp_path / "log", str(models), "--control", "--keys", str(path)) as server:

        def status(wanted, headers):
            method, where = PATHS[wanted]
            answer = server.request(method, where, b"{" if method == "POST" else None, headers)
            if answer.status in (401, 403):
                assert list(answer.json()) == ["error"]
                assert (answer.headers["WWW-Authenticate"] == "Bearer") == (answer.status == 401)
            return answer.status

        passed = {"infer": 400, "metadata": 200, "control": 400}  # the body is no JSON
        for wanted in SCOPES:
            for scope in SCOPES:
                expected = passed[wanted] if scope == wanted else 403
                for header in ("Authorization: Bearer ", "authorization: bEARER ", "X-API-Key: "):
                    name, prefix = header.split(": ")
                    assert status(wanted, {name: f"{prefix}key of {scope}"}) == expected
            for headers in (
                {},
                {"Authorization": "Bearer"},
                {"Authorization": "Bearer key of nobody"},
                {"Authorization": f"Basic key of {wanted}"},
                {"X-API-Key": "k\xe9y"},
                {"X-API-Key": "k" * 5000},
            ):
                assert status(wanted, headers) == 401
        for where in ("/v2/health/live", "/v2/health/ready"):
            assert server.request("GET", where).status == 200
        for where in ("/metrics", "/v2/models/stats", "/openapi.json", "/docs", "/v2", "/nowhere"):
            assert server.request("GET", where).status == 401
            assert server.request("GET", where, None, {"X-API-Key": "key of infer"}).status == 403

        with triton.InferenceServerClient(server.address) as client:
            given = triton.InferInput("x", [1, 5], "FP32").set_data_from_numpy(np.ones((1, 5), np.float32))
            client.infer("planar", [given], headers={"Authorization": "Bearer key of infer"})
            with pytest.raises(InferenceServerException, match="a key is wanted"):
                client.infer("planar", [given])

        path.write_text(line_of("metadata", "another"))
        deadline = time.monotonic() + START_SECONDS
        while status("metadata", {"X-API-Key": "another"}) != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status("metadata", {"X-API-Key": "key of metadata"}) == 401
        log = server.log
    assert "key of" not in log
    assert "Traceback" not in log


def test_new_keys_are_printed_once():
    result = command("--new-key", "infer,control")
    assert result.returncode == 0
    (key, line) = (text.split(": ", 1)[1].strip() for text in result.stdout.splitlines())
    assert line == line_of("infer,control", key).strip()
    refused = command("--new-key", "everything")
    assert (refused.returncode, "everything" in refused.stderr) == (2, True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_strangers_need_keys(host, tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path), "--host", host])
    assert (result.exit_code, "--allow-anonymous" in result.stderr) == (2, True)


def test_everybody_is_let_in_when_asked(models, tmp_path):
    with serve(tmp_path / "log", str(models), "--host", "0.0.0.0", "--allow-anonymous") as server:
        assert server.request("GET", "/v2/models/planar").status == 200


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The CA, and files: of the server's certificate and key, of the CA."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = [folder / name for name in ("cert.pem", "key.pem", "ca.pem")]
    paths[0].write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    return authority, *map(str, paths)


def trusting(authority, client=None):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if client:
        client.configure_cert(context)
    return context


def test_tls(models, tmp_path, certificates):
    authority, cert, key, _ = certificates
    arguments = (str(models), "--tls-cert", cert, "--tls-key", key)
    with serve(tmp_path / "log", *arguments, context=trusting(authority)) as server:
        assert "https://127.0.0.1" in server.log
        assert server.request("GET", "/v2/models/planar").status == 200
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}  # is not taken, and loses no body
        answer = server.request("POST", "/v2/repository/index", b'{"ready": 1}', upgrade)
        assert (answer.status, answer.json()) == (400, {"error": "ready must be true or false"})
        server.context = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            server.request("GET", "/v2/models/planar")
        server.context = None
        with pytest.raises(OSError, match=r"reset|closed"):
            server.request("GET", "/v2/models/planar")


def test_client_certificates(models, tmp_path, certificates):
    authority, cert, key, ca = certificates
    arguments = (str(models), "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca)
    known = trusting(authority, authority.issue_cert("client"))
    with serve(tmp_path / "log", *arguments, context=known) as server:
        assert server.request("GET", "/v2/models/planar").status == 200
        for stranger in (None, trustme.CA().issue_cert("client")):
            server.context = trusting(authority, stranger)
            with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|unknown ca"):
                server.request("GET", "/v2/health/live")
        server.context = known


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tls-cert", __file__), "--tls-key go together"),
        (("--tls-client-ca", __file__), "needs --tls-cert"),
        (("--tls-cert", __file__, "--tls-key", __file__), "tls_cert: "),
        (("--keys", __file__), "keys: line 1: "),
        (("--keys", "/nowhere"), "keys: "),
    ],
)
def test_files_that_are_none(arguments, reason, tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path), *arguments])
    assert (result.exit_code, reason in result.stderr.splitlines()[-1]) == (2, True), result.stderr
