"""docs/service.md: its code runs, its exchange is the real one, its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from pydantic import ByteSize, TypeAdapter
from serving import serve
from starlette.routing import Route
from test_service_process import command

from batchnorm_service.http.app import create_app
from batchnorm_service.http.error_answers import STATUS
from batchnorm_service.http.metrics import Metrics
from batchnorm_service.settings import ENV_PREFIX, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "service.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def table(title):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[2:]]


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, ask = blocks("python")
    start, curl, control, new_key = blocks("console")
    documented, demanding = blocks("json")
    names = {}
    exec(save, names)
    assert start.split()[-1] == "models"
    with serve(tmp_path / "log", "models", "--control") as server:
        _, _, _, url, flag, body = shlex.split(curl)
        assert flag == "-d"
        path = url.removeprefix("http://127.0.0.1:8080")
        headers = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl does
        answer = server.request("POST", path, body.encode(), headers)
        assert answer.body.decode() == documented.strip()
        assert answer.headers["Batchnorm-Fingerprint"] == names["layer"].fingerprint
        assert server.infer("scale", demanding.encode()).status == 200
        assert names["layer"].fingerprint in demanding
        refused = server.infer("scale", demanding.replace("77b2", "0000").encode())
        assert refused.status == 409
        assert "127.0.0.1:8080" in ask
        exec(ask.replace("127.0.0.1:8080", server.address), names)
        for line in control.splitlines():
            _, _, _, verb, url = shlex.split(line)
            answer = server.request(verb, url.removeprefix("http://127.0.0.1:8080"), b"")
            assert (answer.status, bool(answer.body)) == (200, url.endswith("/index"))
    assert names["y"].shape == (32, 3)
    asked, *shown = new_key.splitlines()
    arguments = shlex.split(asked.removeprefix("$ batchnorm serve "))
    printed = command(*arguments).stdout
    line = re.escape("\n".join(shown)).replace("EXAMPLE", r"[\w-]+").replace("DIGEST", "[0-9a-f]{64}")
    assert re.fullmatch(line + "\n", printed)


def test_settings_are_those_of_the_code():
    rows = table("Settings")
    assert len(rows) == len(Settings.model_fields)
    for (flag, variable, default, _), (name, field) in zip(rows, Settings.model_fields.items(), strict=True):
        assert variable == ENV_PREFIX + name.upper()
        assert flag == ("DIR" if name == "models" else f"--{name.replace('_', '-')}")
        if field.default is None:
            assert default == ""
        else:
            assert TypeAdapter(field.annotation).validate_python(default) == field.default
    assert Settings.model_fields["max_body"].annotation is ByteSize


def test_statuses_are_those_of_the_code():
    assert {int(row[0]) for row in table("Errors")} == set(STATUS.values()) | {405, 408, 422, 431, 500}


def test_metrics_are_those_of_the_code(models):
    service = create_app(Settings(models=models)).state.context
    printed = Metrics(service).text("")[0].decode()
    families = set(re.findall(r"# TYPE (\S+)", printed))
    section = PAGE.split("\n## Logs and metrics\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"`((?:batchnorm|nv)_[a-z_]+)", section))
    assert documented == {name for name in families if not name.startswith("nv_")} | {
        "nv_inference_request_success", "nv_inference_count"
    }  # fmt: skip


def test_paths_are_those_of_the_code(models):
    documented = set()
    for verb_and_path, _ in table("Paths"):
        verb, path = verb_and_path.replace("`", "").split()
        path = path.replace("NAME", "{name}").replace("VERSION", "{version}")
        for optional in ("", r"\1"):
            documented.add((verb, re.sub(r"\[(.*?)\]", optional, path)))
    routes = create_app(Settings(models=models)).routes
    served = {
        (verb, route.path)
        for route in routes
        if isinstance(route, Route)
        for verb in route.methods - {"HEAD"}
    }
    served = {pair for pair in served if "{repository}" not in pair[1]}  # all of which are refused
    assert served - documented == {("GET", "/v2/")}
    assert documented <= served


@pytest.mark.parametrize("text", [*blocks("json"), *re.findall(r"`(\{\"(?:live|ready)\".*?\})`", PAGE)])
def test_json_is_json(text):
    json.loads(text)
