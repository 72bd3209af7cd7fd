"""Puts what a benchmark printed into a page of the documentation."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->\n"


def put_in(page: Path, mark: str, text: str) -> None:
    """Write `text` between a line `mark` of the page and the next `END`."""
    before, found = page.read_text().split(mark)
    page.write_text(f"{before}{mark}\n{text}\n{END}{found.split(END, 1)[1]}")
