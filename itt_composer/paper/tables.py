"""The paper's tables, ``tables.yaml``."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from itt_composer.ratios import ratios_key


@cache
def paper_tables() -> dict[str, Any]:
    """Every table, by name: its ``columns`` and its ``rows``."""
    tables = yaml.safe_load((files('itt_composer') / 'paper' / 'tables.yaml').read_text(encoding='utf-8'))
    assert isinstance(tables, dict)
    return tables


def records(name: str) -> list[dict[str, Any]]:
    """The rows of a table, each a mapping of column to value."""
    table = paper_tables()[name]
    return [dict(zip(table['columns'], row, strict=True)) for row in table['rows']]


def paper_rows() -> dict[str, dict[str, float]]:
    """Table 1: model to column to accuracy in percent; ``flops`` in TFLOPs."""
    return {row.pop('model'): row for row in records('table1')}


def elastic_rows() -> dict[str, dict[str, float]]:
    """Tables 2 and 4: token ratios of ITT x4 162M, as ``0.9/0.9/0``, to ``flops`` (TFLOPs) and ``perplexity``."""
    return {
        ratios_key(row['ratios']): {'flops': row['flops'], 'perplexity': row['perplexity']}
        for row in records('table2_and_4')
        if row['model'] == 'itt_x4_162m'
    }
