"""The table of model options in the documentation is derived from the options."""

from __future__ import annotations

from conftest import REPO

from itt_composer.config.option_table import BEGIN, with_table


def test_the_page_has_the_current_table():
    page = (REPO / 'docs' / 'model.md').read_text()
    assert BEGIN in page
    assert with_table(page) == page, 'run: python -m itt_composer.config.option_table docs/model.md'
