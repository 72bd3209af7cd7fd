"""Writes docstrings of the compiled module into its stub: `python -m stub` (with `tests` on the path).

Editors read only the stub, so its docstrings are what a hover shows.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

STUB = Path(__file__).parent.parent / "python" / "batchnorm" / "_core.pyi"
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def with_docstrings(text: str, module: object) -> str:
    """The text of a stub, with the docstring that `module` has for each class and function in it."""
    lines = text.splitlines()
    tree = ast.parse(text)
    found: list[tuple[Documented, str | None]] = [(tree, inspect.getdoc(module)), *documented(tree, module)]
    # From the last to the first, so that the positions of those before stay true.
    for node, doc in sorted(found, key=lambda pair: getattr(pair[0], "lineno", 0), reverse=True):
        put(lines, node, doc)
    return "\n".join(lines) + "\n"


def documented(node: ast.Module | ast.ClassDef, of: object) -> list[tuple[Documented, str | None]]:
    """Classes and functions under a node, each with its docstring; what Python itself documents has none."""
    found: list[tuple[Documented, str | None]] = []
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            thing = getattr(of, child.name)
            found += [(child, inspect.getdoc(thing)), *documented(child, thing)]
        elif isinstance(child, ast.FunctionDef):
            special = child.name.startswith("__")
            found.append((child, None if special else inspect.getdoc(getattr(of, child.name))))
    return found


def put(lines: list[str], node: Documented, doc: str | None) -> None:
    """Puts the docstring in the place of the old one, or of the `...` of a function."""
    first = node.body[0]
    old = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    indent = "" if isinstance(node, ast.Module) else " " * (node.col_offset + 4)
    new = quoted(doc, indent) if doc else []
    if isinstance(node, ast.FunctionDef):
        new = new or [f"{indent}..."]
        before = lines[first.lineno - 1][: first.col_offset].rstrip()
        lines[first.lineno - 1 : first.end_lineno] = ([before] if before else []) + new
    else:
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))]) - 1
        lines[start : first.end_lineno if old else start] = new


def quoted(doc: str, indent: str) -> list[str]:
    """The lines of a docstring; it may hold no backslash and no three quotes."""
    if "\\" in doc or '"""' in doc:
        raise ValueError(f"cannot be written between three quotes: {doc!r}")
    first, *rest = doc.splitlines()
    body = [f'{indent}"""{first}', *(f"{indent}{line}".rstrip() for line in rest)]
    return [*body, f'{indent}"""'] if rest else [f'{body[0]}"""']


def formatted(text: str) -> str:
    """As `ruff format` has it."""
    command = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, text=True, check=True, capture_output=True).stdout


def generated() -> str:
    """What the stub should be."""
    from batchnorm import _core

    return formatted(with_docstrings(STUB.read_text(), _core))


if __name__ == "__main__":
    STUB.write_text(generated())
