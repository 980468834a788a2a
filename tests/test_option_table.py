"""The table of model options in the documentation is derived from the options."""

from __future__ import annotations

from conftest import REPO

from itt_composer.config.option_table import BEGIN, option_table, with_table
from itt_composer.options import ModelOptions


def test_a_row_per_option():
    rows = option_table().splitlines()
    assert [row.split('`')[1] for row in rows[2:]] == ModelOptions.keys()
    assert '| `alpha` | `1.0` | alpha_t,' in option_table()
    assert '| `selection` | `top_k` (or `top_p`, `threshold`) | ' in option_table()


def test_the_page_has_the_current_table():
    page = (REPO / 'docs' / 'model.md').read_text()
    assert BEGIN in page
    assert with_table(page) == page, 'run: python -m itt_composer.config.option_table docs/model.md'
