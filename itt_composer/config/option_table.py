"""The table of model options in ``docs/model.md``, from the fields of :class:`ModelOptions`.

    python -m itt_composer.config.option_table docs/model.md

writes it between the two markers of the page.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from itt_composer.options import ModelOptions

BEGIN, END = '<!-- options: begin -->', '<!-- options: end -->'


def option_table() -> str:
    """The options as a Markdown table, for ``docs/model.md``."""
    rows = ['| key | default | meaning |', '|---|---|---|']
    for f in fields(ModelOptions):
        if f.init:
            default = 'null' if f.default is None else str(f.default).lower() if f.type == 'bool' else f.default
            others = ', '.join(f'`{choice}`' for choice in f.metadata.get('choices', ()) if choice != f.default)
            values = f'`{default}` (or {others})' if others else f'`{default}`'
            rows.append(f'| `{f.name}` | {values} | {f.metadata["doc"]} |')
    return '\n'.join(rows)


def with_table(page: str) -> str:
    """The Markdown page with the current table between the markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f'{before}{BEGIN}\n{option_table()}\n{END}{after}'


if __name__ == '__main__':
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
