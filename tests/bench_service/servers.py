"""How each server is started, as a process of its own on a free loopback port, and stopped by its id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batchnorm_service.keys import new_key
from bench_service.environments import AbsentError, python_of
from bench_service.messages import CHANNELS, model_name, save
from bench_service.rows import EMPTY, ENDPOINT, LISTS, MLSERVER, MODELLED, OURS, ROUTE, TRITON

PEERS = Path(__file__).parent / "peers"
START_SECONDS = 40
STOP_SECONDS = 15


class Workspace:
    """A directory with the models in every server's form, and the key that all requests carry.

    Args:
        directory: Empty; everything that the servers read or write is below it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.models, self.affine = save(directory)
        self.key, line = new_key("infer")
        self.keys = directory / "keys"
        self.keys.write_text(line + "\n")

    def folder(self, name: str) -> Path:
        """Return a new folder."""
        folder = self.directory / name
        folder.mkdir()
        return folder


@dataclass(frozen=True)
class Command:
    """What is run, beside `BENCH_AFFINE` and the peers' modules in its environment."""

    arguments: list[str]
    environment: dict[str, str]


def ours(space: Workspace, port: int) -> Command:
    command = [sys.executable, "-m", "batchnorm_service", str(space.models), "--keys", str(space.keys)]
    return Command([*command, "--port", str(port)], {"BATCHNORM_SERVICE_DRAIN_SECONDS": "0"})


def uvicorn(app: str) -> Callable[[Workspace, int], Command]:
    """Return what starts an app of `peers` on uvicorn, set up as ours is."""
    options = "--loop uvloop --http httptools --ws none --no-access-log --no-server-header --no-proxy-headers"
    options += " --timeout-keep-alive 65 --log-level warning --interface asgi3"

    def command(space: Workspace, port: int) -> Command:
        serve = [sys.executable, "-m", "uvicorn", app, *options.split(), "--port", str(port)]
        return Command(serve, {})

    return command


def mlserver(space: Workspace, port: int) -> Command:
    """MLServer in one process, with neither metrics nor access log nor compression."""
    python = python_of("mlserver")
    folder = space.folder("mlserver")
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "gzip_enabled": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    for channels in CHANNELS:
        name = model_name(channels)
        (folder / name).mkdir()
        model = {"name": name, "implementation": "mlserver_model.Affine", "parameters": {"version": "1"}}
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    return Command([str(python.with_name("mlserver")), "start", str(folder)], {})


TRITON_MODEL = """
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, CHANNELS ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1, CHANNELS ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def triton(space: Workspace, port: int) -> Command:
    """The `tritonserver` that nvidia-pytriton carries, on HTTP and loopback alone, without metrics.

    Its Python backend starts a stub, a process with the interpreter of the environment: that must be the
    first on PATH, and its libpython the one that is found.
    """
    python = python_of("triton")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    server = python.parents[1] / "lib" / f"python{version}" / "site-packages" / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise AbsentError(f"it has no stub for Python {version}")
    folder = space.folder("triton")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    files = server / "backends" / "python"
    for file in (files / "libtriton_python.so", files / "triton_python_backend_utils.py", stub):
        (backend / file.name).symlink_to(file)
    for channels in CHANNELS:
        model = folder / "models" / model_name(channels)
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(TRITON_MODEL.replace("CHANNELS", str(channels)))
        shutil.copy(PEERS / "triton_model.py", model / "1" / "model.py")
        shutil.copy(PEERS / "affine.py", model / "1")  # the stub leaves PYTHONPATH out
    arguments = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    environment = {
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    return Command(arguments, environment)


COMMANDS: dict[str, Callable[[Workspace, int], Command]] = {
    OURS: ours,
    ROUTE: uvicorn("fastapi_route:app"),
    ENDPOINT: uvicorn("asgi_endpoint:app"),
    LISTS: uvicorn("fastapi_lists:app"),
    MODELLED: uvicorn("fastapi_lists:with_response_model"),
    MLSERVER: mlserver,
    TRITON: triton,
    EMPTY: uvicorn("empty_endpoint:app"),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(name: str, space: Workspace) -> Iterator[int]:
    """Run a server until the block ends; gives its port.

    Raises:
        AbsentError: it cannot be installed, or does not start.
    """
    port = free_port()
    command = COMMANDS[name](space, port)
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "BENCH_AFFINE": str(space.affine)}
    log = space.directory / f"{name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command.arguments,
            env=environment | command.environment,
            cwd=space.directory,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait(process, port, log)
        yield port
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until it accepts connections; servers do so when their models are loaded, or soon after."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
    state = "still running" if process.poll() is None else f"status {process.returncode}"
    raise AbsentError(f"does not start ({state}; it says: {last[0][:200]})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, and then whatever it left of the session that it was started in."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    # It is not reaped before its group is ended: so long nobody else has its number.
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    with suppress(PermissionError):  # macOS, of a group that has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
