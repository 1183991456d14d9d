"""Adds pages outside `docs/` to the documentation site, and makes links between both places work in the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
# A link to a file of the repository that is no page becomes plain text: the site holds documentation only.
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./(?!(?:CONTRIBUTING|CHANGELOG|SECURITY)\.md)[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""
    if page.file.src_uri in PAGES:
        markdown = markdown.replace("](docs/", "](")
        return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|[\w/-]+\.md)[^)]*\)", r"\1", markdown)
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return markdown.replace("](../", "](")
