"""The commands that read frozen layers from the models of other programs, and write them as models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
)
from batchnorm.frozen import FrozenBatchNorm
from batchnorm.streaming import counted


@click.command("import", cls=Command, epilog="Example: batchnorm import network.safetensors -o layers")
@layer_argument("state")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the layers; made if there is none.",
)
@click.option(
    "--eps", type=float, default=1e-5, show_default=True, help="ε of the layers; no state holds it."
)
@JSON
def import_(state: Path, output: Path, eps: float, as_json: bool) -> None:
    """Write a frozen layer for each batch norm in STATE, the state of a network of PyTorch.

    STATE is a .safetensors, or a .pt or .pth that torch.save wrote; these need PyTorch, and are loaded with
    weights_only=True. Each layer becomes a file NAME.safetensors in the folder, ready for `batchnorm serve`.
    """
    from batchnorm._state import frozen_layers

    with extra("torch"):
        layers = frozen_layers(state, eps)
    output.mkdir(parents=True, exist_ok=True)
    for name, layer in layers.items():
        layer.save(output / f"{name}.safetensors")
    if as_json:
        written = {name: layer.fingerprint for name, layer in layers.items()}
        print_json(path=str(output), eps=eps, fingerprints=written)
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
