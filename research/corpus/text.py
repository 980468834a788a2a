"""Plain text of a document: decompressed, decoded, without markup and page breaks."""

from __future__ import annotations

import gzip
import re
from html.parser import HTMLParser

_SKIPPED = {'head', 'script', 'style', 'nav', 'header', 'footer'}
_LINES = {'br', 'tr', 'li', 'dt', 'dd'}
_BLOCKS = {'p', 'pre', 'div', 'table', 'ul', 'ol', 'dl', 'section', *(f'h{i}' for i in range(1, 7))}


def plain_text(path: str, content: bytes) -> str | None:
    """Return the text of a file; None where it is not UTF-8."""
    name = path.lower()
    if name.endswith('.gz'):
        name, content = name[:-3], gzip.decompress(content)
    try:
        text = content.decode().replace('\r\n', '\n')
    except UnicodeDecodeError:
        return None
    if name.endswith(('.html', '.htm')):
        text = _without_tags(text)
    elif '\f' in text:
        text = _without_pages(text)
    lines = '\n'.join(line.rstrip() for line in text.split('\n'))
    return re.sub(r'\n{3,}', '\n\n', lines).strip('\n')


def _without_pages(text: str) -> str:
    """Join the pages of an RFC: without the foot and head of each, and the lines of the table of contents."""
    joined = ''
    for page in text.split('\f'):
        body, _, foot = page.rstrip().rpartition('\n')
        body = body.rstrip() if '[Page' in foot else f'{body}\n{foot}'
        head, _, rest = body.lstrip('\n').partition('\n')
        body = rest.lstrip('\n') if head.startswith('RFC ') else body.lstrip('\n')
        # A paragraph ends with its sentence; any other goes on, on the next page.
        joined += body + ('\n\n' if body[-1:] in tuple('.:;?!)') else '\n')
    return '\n'.join(line for line in joined.split('\n') if '. . . .' not in line and '.....' not in line)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped = self.pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._tag(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._tag(tag, -1)

    def _tag(self, tag: str, change: int) -> None:
        if tag in _SKIPPED:
            self.skipped = max(0, self.skipped + change)
        elif tag in _BLOCKS:
            self.pre = max(0, self.pre + change * (tag == 'pre'))
            self.parts.append('\n\n')
        elif tag in _LINES and change > 0:
            self.parts.append('\n')
        elif tag in ('td', 'th'):
            self.parts.append(' ')

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r'\s+', ' ', data))


def _without_tags(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    parser.close()
    text = ''.join(parser.parts)
    return re.sub(r'\n +\n', '\n\n', re.sub(r'\n (?=\S)', '\n', text))
