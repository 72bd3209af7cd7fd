"""The commands that read frozen layers from the models of other programs, and write them as models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from batchnorm._atomic import replacing
from batchnorm._kinds import load
from batchnorm.commands.kit import (
    JSON,
    Command,
    check_suffix,
    extra,
    layer_argument,
    output_option,
    print_json,
    read_array,
    warn,
)
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.streaming import counted

if TYPE_CHECKING:
    import onnx

    from batchnorm.onnx import Verification


@click.command("import", cls=Command, epilog="Example: batchnorm import network.safetensors -o layers")
@layer_argument("file")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the layers; made if there is none.",
)
@click.option(
    "--eps", type=float, help="ε of the layers, which a state does not hold; not for ONNX.  [default: 1e-05]"
)
@click.option("--skip", is_flag=True, help="Of a .onnx: leave out, with a warning, what cannot be read.")
@JSON
def import_(file: Path, output: Path, eps: float | None, skip: bool, as_json: bool) -> None:
    """Write a frozen layer for each batch norm in FILE, a network of PyTorch or an ONNX model.

    FILE is a .onnx, a .safetensors with a state of PyTorch, or a .pt or .pth that torch.save wrote; these
    need PyTorch, and are loaded with weights_only=True. Each layer becomes a file NAME.safetensors in the
    folder, ready for `batchnorm serve`.
    """
    from batchnorm._state import frozen_layers, served_names

    details: dict[str, Any] = {}
    if file.suffix.lower() == ".onnx":
        if eps is not None:
            raise ValueError(f"--eps: was {eps}, but an ONNX model holds ε")
        with extra("onnx"):
            from batchnorm.onnx import frozen_layers as layers_of_model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nodes = layers_of_model(file, skip=skip)
        for warning in caught:
            warn(str(warning.message))
        if not nodes:
            raise ValueError(f"{file}: 1 batch normalization or more wanted, found none")
        names = served_names(nodes)
        layers = {names[node]: layer for node, layer in nodes.items()}
        details["nodes"] = {name: node for node, name in names.items()}
    else:
        if skip:
            raise ValueError("--skip: only for a .onnx")
        details["eps"] = 1e-5 if eps is None else eps
        with extra("torch"):
            layers = frozen_layers(file, details["eps"])
    output.mkdir(parents=True, exist_ok=True)
    for name, layer in layers.items():
        layer.save(output / f"{name}.safetensors")
    if as_json:
        written = {name: layer.fingerprint for name, layer in layers.items()}
        print_json(path=str(output), **details, fingerprints=written)
        return
    for name, layer in layers.items():
        channels = counted(layer.channels, "channel")
        click.echo(f"{output / name}.safetensors: {channels}, fingerprint {layer.fingerprint}")


@click.command(cls=Command, epilog="Example: batchnorm export bn.safetensors -o bn.onnx --rank 2")
@layer_argument("file")
@output_option("The .onnx file to write.")
@click.option(
    "--mode",
    type=click.Choice(["inference", "exact", "affine", "training"]),
    default="inference",
    show_default=True,
    help="Of a batch norm: one BatchNormalization node; arithmetic that gives the bits of apply; x·scale + "
    "shift; or a node that computes new running statistics.",
)
@click.option("--opset", type=int, default=15, show_default=True, help="ONNX operator set.")
@click.option(
    "--rank", type=int, help="Axes of x; 2 for the rows of a .csv.  [default: 4, or those of --shape]"
)
@click.option("--shape", help="Sizes of x's axes, such as 1,64,56,56; a name instead of a number is dynamic.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    help="dtype of x and y.  [default: that of the parameters]",
)
@click.option("--name", default="", help="Name of the node, with which other names begin.")
@click.option("--update-weight", type=float, help="In mode training: weight of the new statistics.")
@click.option("--count", type=int, help="In mode training: values per channel of every batch.")
@click.option(
    "--verify", "verified", is_flag=True, help="Run the model in ONNX Runtime, and print the errors."
)
@click.option(
    "--input",
    "data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .npy to verify with; without it, generated values.",
)
@JSON
def export(
    file: Path,
    output: Path,
    mode: Literal["inference", "exact", "affine", "training"],
    opset: int,
    rank: int | None,
    verified: bool,
    data: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Write the frozen layer in FILE as an ONNX model."""
    check_suffix(output, ".onnx")
    layer = load(file)
    shape = arguments.pop("shape")
    if shape is not None:
        arguments["shape"] = [int(size) if size.isdigit() else size for size in shape.split(",")]
        if not all(size.isdigit() or size.isidentifier() for size in shape.split(",")):
            raise ValueError(f"shape: was {shape}, wanted integers and names, such as rows,3,224,224")
    given = {key: value for key, value in arguments.items() if value not in (None, "")}
    if data is not None and not verified:
        raise ValueError("--input: is of --verify, which is not given")
    if verified and mode == "training":
        raise ValueError("--verify: is not of mode training, where y is not that of the layer")
    report = None
    if isinstance(layer, FrozenBatchNorm):
        model = layer.to_onnx(opset=opset, mode=mode, rank=rank, **given)
        if verified:
            report = _verification(model, layer, data)
    elif mode != "inference":
        raise ValueError(f"mode: was {mode}, wanted inference for the whitening layer in {file}")
    elif verified or given:
        option = "verify" if verified else next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option}: is of a batch norm, and {file} is a whitening layer")
    else:
        model = layer.to_onnx(opset=opset, rank=4 if rank is None else rank)
    rank = len(model.graph.input[0].type.tensor_type.shape.dim)
    with replacing(output) as target:
        target.write(model.SerializeToString())
    if as_json:
        errors = {} if report is None else {"verification": report.as_dict()}
        written = {"path": str(output), "fingerprint": layer.fingerprint, "mode": mode}
        print_json(**written, opset=opset, rank=rank, **errors)
        return
    click.echo(f"{output}: mode {mode}, opset {opset}, rank {rank}, fingerprint {layer.fingerprint}")
    if report is not None:
        _print(report)


def _verification(model: onnx.ModelProto, layer: FrozenBatchNorm, data: Path | None) -> Verification:
    with extra("onnxruntime"):
        import onnx.helper

        from batchnorm.onnx import verify

        if data is None:
            return verify(model, layer)
        x = read_array(data)
        element = model.graph.input[0].type.tensor_type.elem_type
        with np.errstate(over="ignore"):
            return verify(model, layer, x.astype(onnx.helper.tensor_dtype_to_np_dtype(element)))


def _print(report: Verification) -> None:
    rows = {
        "ONNX Runtime, of the exact result": report.runtime,
        "this package, of the exact result": report.ours,
        "ONNX Runtime, of this package": report.between,
    }
    for what, errors in rows.items():
        click.echo(f"  {what}: at most {errors.max:.3g} ulps, on average {errors.mean:.3g}")
    click.echo(f"  {report.differing} of {report.values} values differ in a bit from those of this package")
