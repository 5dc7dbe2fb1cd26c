"""What the site of the documentation (mkdocs.yml) needs beside the pages in ``docs``.

Pages are written for a plain git host: they link to files of the repository. In the site, those of them that are pages
of text are pages too (:data:`PAGES`), and a link to any other file is its name, since the site does not have it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = "docs"

PAGES = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "figures.md",
    "bench/operations.md": "figures-operations.md",
    "src/sdrpc/models/README.md": "demo-model.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
"""Texts outside of ``docs`` → their pages in the site."""

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:\[[^\]]*\]\([^)]*\)|[^\]])*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the texts that are outside of ``docs`` (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=in_site((ROOT / source).read_text(), source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of ``docs``, as the site has them (an event of MkDocs)."""
    source = page.file.src_uri
    return markdown if source in PAGES.values() else in_site(markdown, f"{DOCS}/{source}")


def in_site(text: str, source: str) -> str:
    """``text`` of the file ``source`` (relative to the repository), with the links that the site has."""

    def replaced(match: re.Match[str]) -> str:
        shown, target = LINK.sub(replaced, match["text"]), match["target"]
        path, hash_mark, anchor = target.partition("#")
        if "://" in target or not path:
            return f"{match['picture']}[{shown}]({target})"
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = PAGES.get(file) or (os.path.relpath(file, DOCS) if file.startswith(f"{DOCS}/") else None)
        if page is not None:
            return f"{match['picture']}[{shown}]({page}{hash_mark}{anchor})"
        return shown if shown.strip("`") == file else f"{shown} (`{file}`)"

    return LINK.sub(replaced, text)
