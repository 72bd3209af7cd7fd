"""Sphinx: pages of this folder, the README, and the API from docstrings. `make docs` builds it."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import batchnorm

project = "batchnorm"
author = "The batchnorm developers"
release = version = batchnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"batchnorm {version}"
autodoc_typehints = "none"  # docstrings say what arguments are
autodoc_member_order = "bysource"
napoleon_use_rtype = False
# Pygments does not read a console session whose command goes over several lines.
suppress_warnings = ["misc.highlighting_failure"]
default_role = "code"


def visit_math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Writes MathML, which browsers render by themselves: no script, no font and no network."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def keep_first_line(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An attribute's docstring may have a colon in it: what stands before that is not its type."""
    if what in ("attribute", "property"):
        lines.insert(0, "")


def is_field(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple are in the docstring of its class, and are left out below it."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Registers the writer of mathematics, and what comes before Napoleon."""
    app.connect("autodoc-process-docstring", keep_first_line, priority=0)
    app.connect("autodoc-skip-member", is_field)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))


html_math_renderer = "mathml"
