"""Self-contained HTML pages of tables and pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ccc; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: .9rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The page of the parts, which are HTML."""
    body = '\n'.join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<style>{STYLE}</style>{body}</html>\n'
    )


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of texts, with the first row's keys as its head."""
    head = ''.join(f'<th>{html.escape(name)}</th>' for name in rows[0])
    lines = [''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values()) for row in rows]
    return f'<table><tr>{head}</tr>' + ''.join(f'<tr>{line}</tr>' for line in lines) + '</table>'


def figure(png: bytes, caption: str) -> str:
    """A picture, held in the page itself, and its caption, a text."""
    source = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
