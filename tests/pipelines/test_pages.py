"""Pages hold everything inside, and whatever a file or a class is called stays text."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from cellplane.pipelines import drawing, pages, plots
from cellplane.pipelines.protocol import Picture

EVIL = '<script>alert("x")</script> & $5'


class Tags(HTMLParser):
    """The tags that are open at the end, and all that were seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_names_cannot_become_markup(tmp_path: Path):
    picture = Picture(EVIL, plots.save_axes(drawing.new_axes(), tmp_path / "p.png"), EVIL)
    parts = [pages.heading(EVIL), pages.paragraph(EVIL, "verdict"), pages.items([EVIL]), pages.plain_table([EVIL], [[EVIL], [3]])]
    text = pages.page(EVIL, [*parts, pages.figure(picture)])
    tags = Tags(text)
    assert not tags.open
    assert "script" not in tags.seen
    assert text.count("&lt;script&gt;") == 10


def test_a_picture_is_inside_byte_by_byte(tmp_path: Path):
    path = plots.save_axes(drawing.new_axes(), tmp_path / "p.png")
    text = pages.figure(Picture("title", path))
    assert base64.b64decode(text.split("base64,")[1].split('"')[0]) == path.read_bytes()


def test_a_page_is_written_whole(tmp_path: Path):
    path = pages.write_page(tmp_path / "new" / "report.html", "title", [pages.paragraph("text")])
    assert path.read_text(encoding="utf-8") == pages.page("title", ["<p>text</p>"])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
