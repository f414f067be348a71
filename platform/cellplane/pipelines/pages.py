"""HTML pages that need nothing beside them: no script, no link, pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from cellplane.data.files import atomic_file
from cellplane.pipelines.protocol import Picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; }
div.wide { overflow-x: auto; } div.wide td { white-space: nowrap; } div.wide th { vertical-align: bottom; }
tr.model td { font-weight: 600; background: #eef4fa; }
td.better { color: #006b45; } td.worse { color: #a33c00; }
p.verdict { font-size: 1.15rem; font-weight: 600; background: #eef4fa; padding: 0.8rem 1rem; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole page; ``body`` are pieces of HTML as the functions below make them."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    inside = "\n".join([f"<h1>{html.escape(title)}</h1>", *body])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{inside}\n</body></html>\n'


def write_page(path: Path, title: str, body: Sequence[str]) -> Path:
    """The page in a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(page(title, body), encoding="utf-8")
    return path


def heading(text: str) -> str:
    """A heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` "verdict" stands out."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def items(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return "\n".join(["<ul>", *(f"<li>{html.escape(text)}</li>" for text in texts), "</ul>"])


def plain_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of texts and numbers."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>" for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def figure(picture: Picture) -> str:
    """A picture with its title and what to see in it."""
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    title, caption, seen = html.escape(picture.title), html.escape(picture.caption), html.escape(picture.described)
    image = f'<img alt="{seen}" src="data:image/png;base64,{data}">'
    return f"<h2>{title}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"
