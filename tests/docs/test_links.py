"""Links within the repository lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.blocks import FENCE, ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", FENCE.sub("", document.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = 0
        while (name := slug if not count else f"{slug}-{count}") in found:
            count += 1
        found.add(name)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", document.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").iterdir():
        parent = readme if path.suffix != ".json" else (ROOT / "docs/operations.md").read_text()
        assert path.name in parent


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_can_be_read_and_stay_inside_their_frame(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    shapes = [node.attrib for node in root.iter() if node.tag.endswith(("rect", "text"))]
    assert shapes
    for shape in shapes:
        right = float(shape["x"]) + float(shape.get("width", 0))
        bottom = float(shape["y"]) + float(shape.get("height", 0))
        assert 0 <= float(shape["x"]) <= right <= width
        assert 0 <= float(shape["y"]) <= bottom <= height
    assert "prefers-color-scheme: dark" in path.read_text()
