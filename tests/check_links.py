"""Links within a folder of HTML pages that lead nowhere: `python tests/check_links.py docs-output/html`.

Pages under rust/ are rustdoc's, which checks its own links: here only that those to them exist. Links to
other hosts are not followed, so that no network is needed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the names that links to it may end in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names = {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag links to, and its name."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.names.add(value)


def dead(root: Path) -> list[str]:
    """Each dead link with the page it stands on."""
    pages = {path: Page(path) for path in root.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if "rust" in path.relative_to(root).parts:
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            names = pages[target].names if target in pages else None
            if not target.exists() or (names is not None and unquote(parts.fragment) not in names):
                found.append(f"{path.relative_to(root)}: {link}")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    checked = len(list(folder.rglob("*.html")))
    assert checked > 10, f"{folder} has {checked} pages"
    if links := dead(folder):
        sys.exit("dead links:\n" + "\n".join(links))
    print(f"{checked} pages, no dead link")
