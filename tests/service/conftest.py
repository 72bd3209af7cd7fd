"""A directory of models, good and bad, and one service process over it for all tests."""

from __future__ import annotations

import pytest
from serving import make_layer, serve


@pytest.fixture(scope="session")
def layers():
    """The layer of each model, and of each version that is not the default."""
    return {
        "planar": make_layer(1),
        "planar/2": make_layer(2),
        "last": make_layer(3, channel_axis=-1),
        "wide": make_layer(4, dtype="float64"),
        "wide-last": make_layer(5, dtype="float64", channel_axis=-1),
        "third": make_layer(6, channel_axis=2),
    }


@pytest.fixture(scope="session")
def models(layers, tmp_path_factory):
    """Versions 2 and 10 of `planar`; other models flat; and files that must not be loaded."""
    root = tmp_path_factory.mktemp("models")
    for version, layer in (("2", layers["planar/2"]), ("10", layers["planar"])):
        (root / "planar" / version).mkdir(parents=True)
        layer.save(root / "planar" / version / "bn.safetensors")
    for name in ("last", "wide", "wide-last", "third"):
        layers[name].save(root / f"{name}.safetensors")
    (root / "planar" / "11").mkdir()
    (root / "planar" / "11" / "bn.safetensors").write_bytes(b"cut short")
    (root / "broken.safetensors").write_bytes(b"\x10")
    outside = tmp_path_factory.mktemp("outside") / "bn.safetensors"
    layers["planar"].save(outside)
    (root / "link.safetensors").symlink_to(outside)
    return root


@pytest.fixture(scope="session")
def server(models, tmp_path_factory):
    """The service that most tests share."""
    with serve(tmp_path_factory.mktemp("log") / "log", str(models)) as running:
        yield running
    assert "Traceback" not in running.log
