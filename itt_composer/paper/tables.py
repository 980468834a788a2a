"""The paper's tables, ``tables.yaml``, and its numbers by study, as a report shows them beside its own."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from itt_composer.ratios import ratios_key

# Variant of the study `ablations` to its row in Table 3.
TABLE3_ROWS = {
    'itt_x4': 'itt_x4_162m',
    'without_residual_thinking': 'without_residual_thinking_connection',
    'without_routing': 'without_adaptive_token_routing',
    'without_step_encoding': 'without_thinking_position_encoding',
    'top_p': 'sampling_top_p',
    'tanh': 'weight_norm_tanh',
    'symmetric': 'reweighting_symmetric',
    'llama': 'llama_162m',
}
# What the text of Section 4.2 says of ITT x4 at 162M.
SECTION_4_2 = {'loss minus llama': -0.09, 'loss minus loop_x4': -0.4, 'data share %': 56.8}


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


@cache
def paper_numbers() -> dict[str, dict[tuple[str, str], tuple[float, str]]]:
    """Study of the paper to (variant, metric) to the value and its source."""
    headline: dict[tuple[str, str], tuple[float, str]] = {}
    for name, row in paper_rows().items():
        if name.endswith('_162m'):
            variant = name.removesuffix('_162m')
            headline[variant, 'TFLOPs of a forward pass'] = row['flops'], 'Table 1'
            headline[variant, 'accuracy %'] = row['average'], 'Table 1'
    headline |= {('itt_x4', metric): (value, 'Section 4.2') for metric, value in SECTION_4_2.items()}
    table3 = {row['variant']: row['perplexity'] for row in records('table3')}
    others = {row['model']: row['perplexity'] for row in records('table2_and_4') if row['model'] != 'itt_x4_162m'}
    return {
        'headline': headline,
        'ablations': {(variant, 'perplexity'): (table3[row], 'Table 3') for variant, row in TABLE3_ROWS.items()},
        'elastic': {(name.removesuffix('_162m'), 'perplexity'): (value, 'Table 2') for name, value in others.items()},
    }
