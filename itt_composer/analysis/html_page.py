"""The one base of all HTML pages: self-contained files of tables, figures and text.

Parts of a page are ``Markup``: ``Markup('<p>{}</p>').format(text)`` escapes the text, and a plain string is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from itt_composer.analysis.page_style import style

_environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_PAGE = _environment.from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
{% for part in parts %}
{{ part }}
{% endfor %}
</html>
""")
_TABLE = _environment.from_string("""<div class="wide"><table class="rows{{ ' prose' if prose }}">
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>""")
_FIGURE = _environment.from_string(
    '<figure><img src="data:image/png;base64,{{ data }}" alt="{{ caption }}">'
    '<figcaption>{{ caption }}</figcaption></figure>'
)


def page(title: str, parts: Sequence[str | Markup]) -> str:
    """Return the page of the parts, one after another."""
    return _PAGE.render(title=title, style=Markup(style()), parts=parts)


def table(rows: Sequence[Mapping[str, str | Markup]], prose: bool = False) -> Markup:
    """Return a table; the keys of the first row are its head. With ``prose`` its cells are aligned as text."""
    return Markup(_TABLE.render(rows=rows, prose=prose))


def figure(png: bytes, caption: str) -> Markup:
    """Return a figure, stored in the page itself, with its caption."""
    return Markup(_FIGURE.render(data=base64.b64encode(png).decode(), caption=caption))
