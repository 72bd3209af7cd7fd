"""The commands that read frozen layers from the models of other programs, and write them as models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import click

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
    warn,
)
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.streaming import counted


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
    type=click.Choice(["inference", "exact"]),
    default="inference",
    show_default=True,
    help="Of a batch norm: one BatchNormalization node, or arithmetic that gives the bits of apply.",
)
@click.option("--opset", type=int, default=15, show_default=True, help="ONNX operator set.")
@click.option("--rank", type=int, default=4, show_default=True, help="Axes of x; 2 for the rows of a .csv.")
@JSON
def export(
    file: Path, output: Path, mode: Literal["inference", "exact"], opset: int, rank: int, as_json: bool
) -> None:
    """Write the frozen layer in FILE as an ONNX model."""
    check_suffix(output, ".onnx")
    layer = load(file)
    if isinstance(layer, FrozenBatchNorm):
        model = layer.to_onnx(opset=opset, mode=mode, rank=rank)
    elif mode != "inference":
        raise ValueError(f"mode: was {mode}, wanted inference for the whitening layer in {file}")
    else:
        model = layer.to_onnx(opset=opset, rank=rank)
    with replacing(output) as target:
        target.write(model.SerializeToString())
    if as_json:
        print_json(path=str(output), fingerprint=layer.fingerprint, mode=mode, opset=opset, rank=rank)
    else:
        click.echo(f"{output}: mode {mode}, opset {opset}, rank {rank}, fingerprint {layer.fingerprint}")
