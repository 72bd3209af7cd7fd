"""Operation of the service: shutdown, logs and metrics, with one process or several."""

from __future__ import annotations

import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families
from serving import STOP_SECONDS, serve
from test_service_process import INFER, message

from batchnorm_service.counts import statistics
from batchnorm_service.counts.counters import BYTES_IN_FLIGHT, IN_FLIGHT, STATUSES, SharedRows
from batchnorm_service.logs import MAX_ID, JsonFormatter, request_id, safe_id
from batchnorm_service.models.shared_state import SharedState

DRAIN = 1.0


def begun(server, rows=1000):
    """A connection on which all but the last byte of a request was sent, and that byte."""
    _, body, headers = message(rows)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    connection = socket.create_connection((server.host, server.port), timeout=20)
    connection.sendall(head.encode() + body[:-1])
    return connection, body[-1:]


def lines(server):
    return [json.loads(line) for line in server.log.splitlines()]


def metrics(server, headers=None):
    answer = server.request("GET", "/metrics", None, headers)
    assert answer.status == 200
    families = text_string_to_metric_families(answer.body.decode())
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


# The end


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_drains(models, layers, tmp_path, workers):
    arguments = (str(models), "--workers", str(workers), "--drain-seconds", str(DRAIN))
    with serve(tmp_path / "log", *arguments) as server:
        server.wait_for_log("Application startup complete", workers)
        x, body, headers = message(1000)
        expected = layers["planar"](x).tobytes()
        slow, last = begun(server)
        late, last_late = begun(server)
        time.sleep(0.2)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for _ in range(4 * workers):  # of every worker
            answer = server.request("GET", "/v2/health/ready")
            assert (answer.status, list(answer.json())) == (503, ["error"])
            assert server.request("GET", "/v2/health/live").status == 200
        assert server.request("POST", INFER, body, headers).body.endswith(expected)
        slow.sendall(last)
        response = http.client.HTTPResponse(slow)
        response.begin()
        assert response.read().endswith(expected)
        time.sleep(max(0.0, began + DRAIN + 0.4 - time.monotonic()))
        with pytest.raises(ConnectionRefusedError):
            server.request("GET", "/v2/health/live")
        assert server.process.poll() is None  # it waits for the request that it has begun
        late.sendall(last_late)
        response = http.client.HTTPResponse(late)
        response.begin()
        assert response.read().endswith(expected)
        assert server.process.wait(STOP_SECONDS) == 0
        slow.close()
        late.close()
    assert {line["level"] for line in lines(server)} <= {"info", "error"}
    assert not any("exception" in line for line in lines(server))


def test_a_second_signal_ends_the_drain(models, tmp_path):
    with serve(tmp_path / "log", str(models), "--drain-seconds", "60") as server:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.request("GET", "/v2/health/ready").status == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_SECONDS) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_cannot_start_says_so(models, tmp_path, workers):
    """Without room for its shared state, or without it, the status is not 0 and nothing hangs."""
    environment = {**os.environ, "BATCHNORM_SERVICE_RUN_DIR": str(tmp_path)}
    code = (
        "import batchnorm_service.__main__ as m, batchnorm_service.models.repository as r\n"
        "load = r.Repository.load_all\n"
        "def spoiled(self):\n"
        "    failed = load(self)\n"
        "    for path in self._state.path.joinpath('layers').iterdir(): path.write_bytes(b'')\n"
        "    return failed\n"
        "r.Repository.load_all = spoiled\n"
        f"m.main([{str(models)!r}, '--port=0', '--workers={workers}'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=30, capture_output=True, text=True
    )
    assert result.returncode == 3, result.stderr
    assert "the process could not start" in result.stderr
    assert list(tmp_path.iterdir()) == []


# Logs


def test_every_line_is_json_and_nothing_else_is_left_behind(models, tmp_path):
    (tmp_path / "run").mkdir()
    arguments = (str(models), "--access-log", "--run-dir", str(tmp_path / "run"))
    with serve(tmp_path / "log", *arguments) as server:
        assert len(list((tmp_path / "run").iterdir())) == 1
        hostile = 'a"b\\c é{}\t' + "x" * 500
        answer = server.request(
            "GET", "/v2/models/nobody", None, {"X-Request-Id": hostile.encode("utf-8").decode("latin-1")}
        )
        assert answer.headers["X-Request-Id"] == safe_id(hostile.encode().decode("latin-1"))
        assert len(answer.headers["X-Request-Id"]) == MAX_ID
        _, body, headers = message(3)
        server.request("POST", INFER, body, headers | {"X-Request-Id": "order-66"})
        assert "X-Request-Id" not in server.request("GET", "/v2/health/live").headers
    assert list((tmp_path / "run").iterdir()) == []
    requests = [line for line in lines(server) if line["message"] == "request"]
    missing = next(line for line in requests if line["path"] == "/v2/models/nobody")
    assert (missing["status"], missing["method"], missing["request_id"]) == (
        404,
        "GET",
        answer.headers["X-Request-Id"],
    )
    done = next(line for line in requests if line["path"] == INFER)
    assert (done["status"], done["request_id"], done["client"]) == (200, "order-66", "127.0.0.1")
    assert done["ms"] > 0
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in lines(server))


def test_a_record_carries_its_request_and_its_traceback():
    try:
        raise ValueError("é\n\ud800")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "said %s", ("\n",), sys.exc_info())
    token = request_id.set("mine")
    text = JsonFormatter().format(record)
    request_id.reset(token)
    assert "\n" not in text
    assert text.isascii()
    found = json.loads(text)
    assert (found["request_id"], found["message"], found["level"]) == ("mine", "said", "error")
    assert found["exception"].startswith("Traceback")


# Metrics and statistics


def test_metrics_and_statistics_agree_over_workers(models, tmp_path):
    arguments = (str(models), "--workers", "2")
    with serve(tmp_path / "log", *arguments) as server:
        server.wait_for_log("Application startup complete", 2)
        _, body, headers = message(3)
        before = metrics(server)
        model = (("model", "planar"), ("version", "10"))
        assert before["batchnorm_workers",] == 2
        assert before["nv_inference_request_success", *model] == 0

        def ask(count):
            for _ in range(count):
                server.request("POST", INFER, body, headers)
                server.request("POST", INFER, body[:-1], headers)

        threads = [threading.Thread(target=ask, args=(25,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(4):  # whichever worker answers
            after = metrics(server)
            assert (
                after["batchnorm_inference_requests_total", model[0], ("outcome", "success"), model[1]] == 100
            )
            assert (
                after["batchnorm_inference_requests_total", model[0], ("outcome", "failure"), model[1]] == 100
            )
            assert after["batchnorm_inference_rows_total", *model] == 300
            assert after["nv_inference_request_success", *model] == 100
            assert after["nv_inference_request_failure", *model] == 100
            assert after["nv_inference_count", *model] == 300
            assert after["nv_inference_exec_count", *model] == 100
            assert after["batchnorm_http_responses_total", ("code", "400")] == 100
            assert after["batchnorm_http_responses_total", ("code", "200")] >= 100
            assert after["batchnorm_request_duration_seconds_count",] == 200
            assert after["batchnorm_request_duration_seconds_bucket", ("le", "+Inf")] == 200
            assert after["batchnorm_requests_in_flight",] == after["batchnorm_request_bytes_in_flight",] == 0
            with triton.InferenceServerClient(server.address) as client:
                (stats,) = client.get_inference_statistics("planar", "10")["model_stats"]
            assert (stats["inference_count"], stats["execution_count"]) == (300, 100)
            assert (
                stats["inference_stats"]["success"]["count"]
                == stats["inference_stats"]["fail"]["count"]
                == 100
            )
            nanoseconds = stats["inference_stats"]["success"]["ns"]
            assert after["nv_inference_request_duration_us", *model] == nanoseconds / 1000
            assert abs(stats["last_inference"] / 1000 - time.time()) < 60
        (build,) = (key for key in after if key[0] == "batchnorm_build_info")
        assert {"core", "python", "simd", "threads", "version"} == {name for name, _ in build[1:]}
        (info,) = (key for key in after if key[0] == "batchnorm_model_info" and ("version", "10") in key)
        assert len(dict(info[1:])["fingerprint"]) == 64
        assert server.request(
            "GET", "/metrics", None, {"Accept": "application/openmetrics-text"}
        ).body.endswith(b"# EOF\n")


def test_counters_of_processes_are_summed(tmp_path):
    first, second = SharedState(tmp_path), SharedState(tmp_path)
    first.register()
    second.register()
    ours, theirs = SharedRows(first), SharedRows(second)
    for rows, count, last in ((ours, 3, 70), (theirs, 2**40, 50)):
        rows.mine("a", "1")[statistics.SUCCESSES] += count
        rows.mine("a", "1")[statistics.LAST] = last
        rows.process[IN_FLIGHT] += count
        rows.process[BYTES_IN_FLIGHT] += 1
        rows.process[STATUSES + 200] += count
    ours.mine("a", "2")[statistics.ROWS] = 1
    assert ours.models() == {("a", "1"), ("a", "2")}
    for rows in (ours, theirs):
        assert rows.total("a", "1")[statistics.SUCCESSES] == 2**40 + 3
        assert rows.total("a", "1")[statistics.LAST] == 70
        assert rows.total("a", "2")[statistics.ROWS] == 1
        assert set(rows.total("b", "1")) == {0}
        total = rows.total_of_processes()
        assert (total[IN_FLIGHT], total[BYTES_IN_FLIGHT], total[STATUSES + 200]) == (2**40 + 3, 2, 2**40 + 3)
    first.leave()  # what it did counts on, what it was doing does not
    total = theirs.total_of_processes()
    assert (total[IN_FLIGHT], total[STATUSES + 200]) == (2**40, 2**40 + 3)


def test_without_room_for_counters_a_process_counts_for_itself(tmp_path, caplog):
    state = SharedState(tmp_path)
    state.register()
    rows = SharedRows(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        rows.mine("a", "1")[statistics.ROWS] += 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert rows.models() == set()
    assert rows.mine("a", "1")[statistics.ROWS] == 5
    assert "are of this process alone" in caplog.text


def test_a_model_may_be_named_infer(layers, tmp_path):
    """Requests of its metadata do not count as inference, but under their own status, also in the log."""
    (tmp_path / "models").mkdir()
    layers["planar"].save(tmp_path / "models" / "infer.safetensors")
    with serve(tmp_path / "log", str(tmp_path / "models"), "--access-log") as server:
        for path in ("/v2/models/infer", "/v2/models/infer/ready", "/v2/models/infer/versions/1"):
            assert server.request("GET", path).status == 200
        for path in ("/v2/models/infer/infer", "/v2/models/infer/versions/infer", "/v2/models/a/b/infer"):
            assert server.request("GET", path).status in (404, 405)
        _, body, headers = message(3)
        assert server.request("POST", "/v2/models/infer/infer", body, headers).status == 200
        counted = metrics(server)
        codes = {key[1][1]: n for key, n in counted.items() if key[0] == "batchnorm_http_responses_total"}
        assert codes == {"200": 4 + server.log.count('"path": "/v2/health/live"'), "404": 2, "405": 1}
        assert counted["batchnorm_request_duration_seconds_count",] == 1
        assert all(line["status"] for line in lines(server) if line["message"] == "request")
