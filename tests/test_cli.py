"""The command line: what each command writes, and every example of `--help` and docs/cli.md."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import batchnorm as bn
import batchnorm.demo
from batchnorm.cli import main
from batchnorm.onnx import load_frozen
from batchnorm.streaming import merge_in_order
from cases import bits, moments_bits

DOCS = Path(__file__).parent.parent / "docs/cli.md"
CSV = "height,width\n1.5,20\n2.5,40\n3.5,30\n"
EXAMPLES = {name: command.epilog.removeprefix("Example: ") for name, command in main.commands.items()}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A new working directory with a table and the layer fitted to it."""
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text(CSV)
    bn.FrozenBatchNorm.from_moments(bn.moments(read_csv("my.csv"))).save("bn.safetensors")
    return tmp_path


def read_csv(path, dtype=np.float64):
    return np.loadtxt(path, dtype, delimiter=",", skiprows=1, ndmin=2)


def run(*arguments):
    """Run a command in this process; it must succeed, with nothing on standard error."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def fit(source, *options):
    run("fit", source, "-o", "fitted.safetensors", *options)
    return bn.FrozenBatchNorm.load("fitted.safetensors")


def error_of(*arguments):
    """The one line that a command prints if it fails; the folder must be left as it was."""
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"batchnorm: [^\n]+\n", result.stderr)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    return result.stderr.removeprefix("batchnorm: ").strip()


# The examples


def test_every_command_has_an_example():
    assert set(EXAMPLES) == {
        *("fit", "apply", "inspect", "import", "export", "lint", "recalibrate", "fold", "serve", "demo")
    }
    for name, example in EXAMPLES.items():
        assert shlex.split(example)[:2] == ["batchnorm", name]
        assert example in " ".join(run(name, "--help").split())


OF_MODELS = {"import", "lint", "recalibrate", "fold"}  # their tests have files for them


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - OF_MODELS - {"serve", "demo"}))
def test_example(name):
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(EXAMPLES[name])],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    if "-o" in EXAMPLES[name]:
        assert Path(re.search(r"-o (\S+)", EXAMPLES[name])[1]).stat().st_size > 0


def test_serve_example():
    """The example with another port, since 8080 may be in use. The request is that of docs/cli.md."""
    assert "--port 8080" in EXAMPLES["serve"]
    command = [sys.executable, "-m", *shlex.split(EXAMPLES["serve"].replace("8080", "0"))]
    environment = os.environ | {"BATCHNORM_SERVICE_DRAIN_SECONDS": "0"}
    with (
        Path("log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            address, deadline = None, time.monotonic() + 60
            while not address:
                assert process.poll() is None, Path("log").read_text()
                assert time.monotonic() < deadline, Path("log").read_text()
                time.sleep(0.05)
                address = re.search(r"http://127\.0\.0\.1:\d+", Path("log").read_text())
            path, body = re.search(
                r"curl -s http://\S+?(/\S+).*?-d '(.+?)'", DOCS.read_text(), re.DOTALL
            ).groups()
            with urllib.request.urlopen(address[0] + path, body.encode(), timeout=30) as response:
                answer = json.load(response)
        finally:
            process.terminate()
    assert process.returncode is not None
    x = np.array([[1.5, 20]], np.float32)
    expected = bn.FrozenBatchNorm.load("bn.safetensors")(x)
    assert answer["outputs"][0]["shape"] == [1, 2]
    assert np.array(answer["outputs"][0]["data"], np.float32).tobytes() == expected.tobytes()


@pytest.mark.long
def test_demo_example():
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(EXAMPLES["demo"])],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "checks passed" in done.stdout
    assert Path(shlex.split(EXAMPLES["demo"])[-1], "report.md").stat().st_size > 0


@pytest.mark.parametrize(("steps", "status"), [(200, 0), (10, 1)])
def test_demo(monkeypatch, steps, status):
    """The whole demonstration with fewer steps. Ten do not train enough: a check fails, with status 1."""
    monkeypatch.setattr("batchnorm.demo.main", functools.partial(batchnorm.demo.main, steps=steps))
    result = CliRunner().invoke(main, ["demo", "--output", "shown"])
    assert result.exit_code == status, result.output
    assert ("checks passed" in result.stdout) == (status == 0)
    assert Path("shown/report.md").exists() == (status == 0)
    assert bool(re.fullmatch(r"Error: this check failed: [^\n]+\n", result.stderr)) == (status == 1)


def test_docs_print_what_is_printed(folder):
    """Every line of a ```console block that starts with $ is run, in order, and prints what follows it."""
    steps = 0
    for block in re.findall(r"```console\n(.*?)```", DOCS.read_text(), re.DOTALL):
        for command, printed in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            done = subprocess.run(
                ["bash", "-c", command],
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.stdout == printed, command
            steps += 1
    assert steps >= 10


def test_the_installed_script_is_the_module():
    by_script = subprocess.run(
        ["batchnorm", "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert by_script.stdout == run("--version") == f"{bn.__version__}\n"


# fit


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        CSV.partition("\n")[2],
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV.partition("\n")[2],
        CSV + "\n\n",
        CSV.rstrip(),
        '"height","width ""b"""\n"1.5","20"\n 2.5 , 40 \n3.5,3e1\n',
        '"two\nlines",width\n1.5,20\n2.5,40\n3.5,30\n',
    ],
)
def test_fit_csv(text):
    Path("t.csv").write_text(text, encoding="utf-8", newline="")
    assert fit("t.csv") == bn.FrozenBatchNorm.load("bn.safetensors")


def test_fit_reports(folder):
    layer = bn.FrozenBatchNorm.load("bn.safetensors")
    told = json.loads(run("fit", "my.csv", "-o", "bn.safetensors", "--json"))
    assert told == {"path": "bn.safetensors", "fingerprint": layer.fingerprint, "count": 3, "channels": 2}
    plain = run("fit", "my.csv", "-o", "bn.safetensors")
    assert plain == f"bn.safetensors: 2 channels of 3 values, fingerprint {layer.fingerprint}\n"
    Path("one.csv").write_text("1.5\n2.5\n")
    assert run("fit", "one.csv", "-o", "x.safetensors").startswith("x.safetensors: 1 channel of 2 values, ")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channel_axis", [1, -1, 0, 2])
def test_fit_npy(rng, dtype, order, channel_axis):
    x = np.array(rng.normal(3, 2, (7, 5, 4, 3)), dtype, order=order)
    np.save("x.npy", x)
    wide = "float64" if x.dtype.itemsize == 8 else "float32"
    moments = bn.moments(x, channel_axis=channel_axis)
    layer = fit("x.npy", "--channel-axis", channel_axis)
    assert layer == bn.FrozenBatchNorm.from_moments(moments, channel_axis=channel_axis, dtype=wide)


def test_fit_options(rng):
    x = rng.normal(3, 2, (50, 3))
    np.save("x.npy", x)
    layer = fit("x.npy", "--eps", "1e-3", "--dtype", "float32", "--ddof", "0")
    assert layer == bn.FrozenBatchNorm.from_moments(bn.moments(x), eps=1e-3, ddof=0, dtype="float32")
    assert fit("my.csv", "--dtype", "float64").dtype == np.float64


def test_fit_merges_chunks_of_2_to_the_20_values(rng):
    """So says the documentation: the bits are those of this tree, whatever the format."""
    x = rng.integers(-9, 9, (2_700_000, 1)).astype(np.float64)
    m = [bn.moments(x[start : start + 2**20]) for start in (0, 2**20, 2**21)]
    expected = bn.FrozenBatchNorm.from_moments(m[0].merge(m[1]).merge(m[2]), dtype="float64")
    np.save("x.npy", x)
    assert fit("x.npy") == expected
    np.save("x.npy", x.reshape(-1, 10, 1, 10))  # rows of 100 values, which do not divide a chunk
    rows = 2**20 // 100
    m = [bn.moments(part, channel_axis=2) for part in np.split(np.load("x.npy"), [rows, 2 * rows])]
    tree = m[0].merge(m[1]).merge(m[2])
    assert fit("x.npy", "--channel-axis", 2) == bn.FrozenBatchNorm.from_moments(
        tree, channel_axis=2, dtype="float64"
    )
    Path("x.csv").write_text("\n".join(f"{int(v)}" for v in x[:, 0]))
    assert fit("x.csv", "--dtype", "float64", "--header", "no") == expected


@pytest.mark.parametrize("channel_axis", [0, -2])
def test_channels_first_are_one_chunk(rng, channel_axis):
    x = rng.normal(3, 2, (3, 400_000)).astype(np.float32)
    np.save("x.npy", x)
    layer = fit("x.npy", "--channel-axis", channel_axis)
    moments = bn.moments(x, channel_axis=channel_axis)
    assert layer == bn.FrozenBatchNorm.from_moments(moments, channel_axis=channel_axis)
    run("apply", "fitted.safetensors", "x.npy", "-o", "y.npy")
    assert bits(np.load("y.npy")) == bits(layer(x))


def test_merge_tree(rng):
    parts = [bn.moments(rng.normal(size=(size, 3))) for size in (5, 2, 7, 1, 9, 4, 3)]
    a, b, c, d, e, f, g = parts
    trees = {
        1: a,
        2: a.merge(b),
        3: a.merge(b).merge(c),
        5: a.merge(b).merge(c.merge(d)).merge(e),
        7: a.merge(b).merge(c.merge(d)).merge(e.merge(f).merge(g)),
    }
    for count, tree in trees.items():
        assert moments_bits(merge_in_order(parts[:count])) == moments_bits(tree)
    assert merge_in_order([]) is None


# apply


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channel_axis", [1, -1, 0])
def test_apply_npy(rng, dtype, order, channel_axis):
    x = np.array(rng.normal(3, 2, (5, 5, 4, 5)), dtype, order=order)
    x[1, 1] = (np.nan, np.inf, 0, 1, 2)
    np.save("x.npy", x)
    mean, var = rng.normal(size=5), rng.uniform(1, 2, 5)
    wide = "float64" if x.dtype.itemsize == 8 else "float32"
    layer = bn.FrozenBatchNorm(mean, var, channel_axis=channel_axis, dtype=wide)
    layer.save("layer.safetensors")
    assert run("apply", "layer.safetensors", "x.npy", "-o", "y.npy") == ""
    y = np.load("y.npy")
    assert (y.dtype, y.shape) == (x.dtype.newbyteorder("="), x.shape)
    assert bits(y) == bits(layer(x))


def test_apply_streams(rng):
    """More than one chunk; and the file may be the source itself, which stays whole until the output is."""
    x = rng.integers(-99, 99, (530_000, 2)).astype(np.float64)
    layer = bn.FrozenBatchNorm([30, 30], [4, 5], dtype="float64")
    layer.save("wide.safetensors")
    np.save("x.npy", x)
    run("apply", "wide.safetensors", "x.npy", "-o", "x.npy")
    assert bits(np.load("x.npy")) == bits(layer(x))
    Path("x.csv").write_text("a,b\n" + "\n".join(f"{a},{b}" for a, b in x.tolist()))
    run("apply", "wide.safetensors", "x.csv", "-o", "x.csv")
    assert bits(read_csv("x.csv")) == bits(layer(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_apply_csv(rng, dtype):
    """Numbers come back from the text with every bit, computed in the dtype of the layer."""
    x = rng.normal(30, 2, (5000, 2)).astype(dtype)
    rows = "".join(f"{a!s},{b!s}\n" for a, b in x)
    Path("x.csv").write_text('"a, b",c\n' + rows)
    layer = bn.FrozenBatchNorm([30, 30], [4, 5], [1e-9, 1], dtype=dtype)
    layer.save("layer.safetensors")
    run("apply", "layer.safetensors", "x.csv", "-o", "y.csv")
    assert Path("y.csv").read_text().startswith('"a, b",c\n')
    assert bits(read_csv("y.csv", dtype)) == bits(layer(x))


def test_apply_to_nothing():
    np.save("x.npy", np.empty((0, 2, 3), np.float32))
    run("apply", "bn.safetensors", "x.npy", "-o", "y.npy")
    assert np.load("y.npy").shape == (0, 2, 3)
    Path("x.csv").write_text("a,b\n")
    run("apply", "bn.safetensors", "x.csv", "-o", "y.csv")
    assert Path("y.csv").read_text() == "a,b\n"


def test_a_source_that_goes_bad_midway_leaves_the_old_output():
    """Beyond the first chunk, when some of the output has already been written."""
    Path("x.csv").write_text("1,2\n" * 530_000 + "3,x\n")
    Path("y.csv").write_text("old")
    told = error_of("apply", "bn.safetensors", "x.csv", "-o", "y.csv")
    assert told == "x.csv: line 530001, column 2: 'x' is not a number"


# inspect and export


def test_inspect_json_holds_the_layer(rng):
    layer = bn.FrozenBatchNorm(*rng.uniform(0.1, 3, (4, 5)), eps=1e-3, channel_axis=-1, dtype="float64")
    layer.save("layer.safetensors")
    told = json.loads(run("inspect", "layer.safetensors", "--json"))
    assert told.pop("path") == "layer.safetensors"
    assert told.pop("fingerprint") == layer.fingerprint
    assert told.pop("channels") == 5
    assert bn.FrozenBatchNorm(**told) == layer


def test_inspect_table_has_every_digit(rng):
    layer = bn.FrozenBatchNorm(*rng.uniform(-1e-9, 1e-9, (4, 40)) ** 2, eps=1e-3, dtype="float64")
    layer.save("layer.safetensors")
    table = run("inspect", "layer.safetensors")
    for text in (layer.fingerprint, "float64", "0.001"):
        assert text in table
    rows = [re.findall(r"[-+.\de]+", line) for line in table.splitlines() if line.startswith("│")]
    columns = np.array(rows, np.float64).T
    for column, values in zip(
        columns, (range(40), layer.gamma, layer.beta, layer.mean, layer.var), strict=True
    ):
        np.testing.assert_array_equal(column, values)


@pytest.mark.parametrize("mode", ["inference", "exact"])
def test_export(mode):
    layer = bn.FrozenBatchNorm.load("bn.safetensors")
    told = json.loads(
        run("export", "bn.safetensors", "-o", "x.onnx", "--mode", mode, "--opset", 17, "--json")
    )
    assert told == {"path": "x.onnx", "fingerprint": layer.fingerprint, "mode": mode, "opset": 17, "rank": 4}
    model = onnx.load("x.onnx")
    assert load_frozen(model) == layer
    assert model.opset_import[0].version == 17
    assert model == layer.to_onnx(mode=mode, opset=17)
    assert layer.fingerprint in run("export", "bn.safetensors", "-o", "x.onnx", "--rank", 2)


# People and pipes


def test_a_bar_for_a_terminal_only(rng):
    np.save("x.npy", rng.normal(size=(600_000, 4)).astype(np.float32))
    command = [sys.executable, "-m", "batchnorm", "fit", "x.npy", "-o", "x.safetensors"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert piped.stderr == ""

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other end of a terminal is closed
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
        assert process.stdout.read() == piped.stdout
    assert process.returncode == 0
    assert b"fit" in shown
    assert b"100%" in shown


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_left(options):
    """As in `batchnorm inspect … | true`: no traceback and no message."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "batchnorm", "inspect", "bn.safetensors", *options]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert done.stderr == b""
