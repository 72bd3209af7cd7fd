"""wrk: its script, one run of it, and what it counted."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from bench_service.messages import Message

MISSING = "missing: wrk (on Debian and Ubuntu: the package wrk)"

# Latencies are microseconds. wrk counts as failed statuses those beyond 399.
DONE = """
done = function(summary, latency, requests)
   local e = summary.errors
   io.write(string.format('\\n{"requests": %d, "us": %d, "bytes": %d, "p50": %d, "p99": %d, ' ..
      '"status": %d, "socket": %d}\\n', summary.requests, summary.duration, summary.bytes,
      latency:percentile(50), latency:percentile(99), e.status, e.connect + e.read + e.write + e.timeout))
end
"""


class Run(NamedTuple):
    """Requests answered in a second, latencies in milliseconds, and what went wrong."""

    rate: float
    p50: float
    p99: float
    failure: str | None


def installed() -> bool:
    return shutil.which("wrk") is not None


def write_script(path: Path, sent: Message) -> Path:
    """Write the Lua that sends a message, with its body in a file beside it."""
    body = path.with_suffix(".body")
    body.write_bytes(sent.body)
    headers = "".join(f"wrk.headers[{json.dumps(n)}] = {json.dumps(v)}\n" for n, v in sent.headers.items())
    path.write_text(
        f'wrk.method = "POST"\nwrk.path = {json.dumps(sent.path)}\n{headers}'
        f'local file = assert(io.open({json.dumps(str(body))}, "rb"))\n'
        f'wrk.body = file:read("*a")\nfile:close()\n{DONE}'
    )
    return path


def run(port: int, script: Path, connections: int, seconds: int, answer_bytes: int) -> Run:
    """Run wrk on one thread; answers shorter than `answer_bytes` on average are a failure too."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
    result = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/"], capture_output=True, text=True, timeout=seconds + 30
    )
    if result.returncode:
        return Run(0, 0, 0, f"wrk: {(result.stderr or result.stdout).strip()[-200:]}")
    counted = json.loads(result.stdout.strip().splitlines()[-1])
    failure = None
    if counted["status"] or counted["socket"]:
        failure = f"{counted['status']} answers not 200, {counted['socket']} failed connections"
    elif not counted["requests"]:
        failure = "no answer"
    elif counted["bytes"] < counted["requests"] * answer_bytes:
        failure = f"answers of {counted['bytes'] // counted['requests']} bytes, not {answer_bytes}"
    rate = counted["requests"] / counted["us"] * 1e6
    return Run(rate, counted["p50"] / 1e3, counted["p99"] / 1e3, failure)
