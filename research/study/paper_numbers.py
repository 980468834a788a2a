"""The paper's numbers by study, which a report shows beside its own."""

from __future__ import annotations

from functools import cache

from itt_composer.paper.tables import paper_rows, records

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
