"""Every picture from its table, and a page with all of them beside what the paper says."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from itt_composer.analysis import html_page
from itt_composer.analysis.router_weights import plot_router_weights
from itt_composer.analysis.step_encodings import plot_step_encodings
from itt_composer.analysis.token_page import Passage, token_page
from itt_composer.atomic import write_text
from itt_composer.evaluation import sweep
from itt_composer.paper.tables import elastic_rows
from research.figures import difficulty, easy_and_hard, logit_lens, over_training
from research.figures.measurements import read_table
from research.figures.studies import draw_studies

Source = tuple[Path, str]
"""A table's file, and what it was measured on, in words."""
DPI = 200


@dataclass(frozen=True)
class Picture:
    """One picture."""

    name: str
    title: str
    table: str
    draw: Callable[[pd.DataFrame], Figure]
    paper: str
    """What the paper says or shows."""


def plot_elastic(table: pd.DataFrame) -> Figure:
    """Perplexity against FLOPs; ``table`` has the columns of ``sweep.Setting`` and ``trained``."""
    settings = [sweep.Setting(**row) for row in table.drop(columns='trained').to_dict('records')]  # type: ignore[misc]
    return sweep.plot(settings, table['trained'].iloc[0])


EASY_AND_HARD = (
    'Paper (GPT-2 of 12 layers, no numbers but these): on easy samples the norm decays over the layers 0 to 2 and 11, '
    'and stays below 3 in the layers 3 to 10; on hard ones it oscillates through all layers, with spikes at 3, 5, 7 '
    'and 9 (counted from 0; here layers are counted from 1).'
)
PICTURES = (
    Picture('figure2', 'Figure 2: gradient nuclear norm, easy against hard samples', 'easy_and_hard',
            easy_and_hard.plot, EASY_AND_HARD),
    Picture('figure2_plain', 'Figure 2, of the plain model', 'easy_and_hard_plain', easy_and_hard.plot, EASY_AND_HARD),
    Picture('figure6_left', 'Figure 6, left: perplexity against FLOPs', 'elastic', plot_elastic,
            'Paper: Tables 2 and 4, below; every setting lies between 10.21 and 10.56, the plain model at 11.13.'),
    Picture('figure6_middle', 'Figure 6, middle: average step encoding', 'step_encodings', plot_step_encodings,
            'Paper (no numbers): the earlier steps come first, and deeper ones also have high values.'),
    Picture('figure6_middle_over_training', 'Step encodings over the training', 'step_encodings_over_training',
            over_training.plot, 'Not in the paper.'),
    Picture('figure6_right', 'Figure 6, right: router weights', 'router_weights', plot_router_weights,
            'Paper: the distribution for step 3-2 of ITT x4, normal and concentrated at 0.6 to 0.8 (A.4); 30 to 50 % '
            'of the tokens think again.'),
    Picture('figure6_right_over_training', 'Router weights over the training', 'router_weights_over_training',
            over_training.plot, 'Not in the paper.'),
    Picture('figure7_right', 'Figure 7, right: the right token through the layers, by logit lens', 'logit_lens',
            logit_lens.plot, "Paper: the tokens 'three' and 'stand' of one text, where ITT rises and LLaMA fails; here "
            'the mean over held-out tokens, with a 95 % interval over documents.'),
    Picture('stream_growth', 'How the residual stream grows', 'logit_lens', logit_lens.plot_growth,
            'Not in the paper. What a layer writes to the stream is of much the same size everywhere, so the more the '
            'stream has grown before a layer, the less the layer changes it.'),
    Picture('depth_and_loss', 'Are the tokens that think more the harder ones?', 'depth_and_loss',
            difficulty.plot_correlations, 'Paper (Section 4.4, Figure 7): difficult tokens get slow thinking, easy '
            'ones fast; no measure of it.'),
    Picture('depth_and_loss_by_step', 'Which steps choose the harder tokens?', 'depth_and_loss_by_step',
            difficulty.plot_by_step, 'Paper (Section 4.4): steps 3-3 and 7-3 compensate, with simple tokens that '
            'earlier steps passed over; the others prefer important ones.'),
)  # fmt: skip
TOKEN_PAGES = 'token_pages'


def draw_all(sources: Mapping[str, Source], studies: Path, out: Path) -> Path:
    """Draw every picture that has a table as PNG and PDF, write the token pages, and an index page.

    Args:
        sources: by the table's name.
        studies: the folder with a folder for each study whose results are stored.
        out: the folder to write to.

    Returns:
        The index page.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = ['<h1>Figures</h1>']
    for picture in PICTURES:
        if picture.table not in sources:
            continue
        file, about = sources[picture.table]
        table = read_table(file)
        figure = picture.draw(table)
        with matplotlib.rc_context({'pdf.fonttype': 42}):  # publishers refuse matplotlib's own kind, Type 3
            for suffix in ('png', 'pdf'):
                figure.savefig(out / f'{picture.name}.{suffix}', dpi=DPI)
        parts.append(f'<h2>{html.escape(picture.title)}</h2>')
        parts.append(html_page.figure((out / f'{picture.name}.png').read_bytes(), f'{about} {picture.paper}'))
        if picture.table in NUMBERS:
            parts.append(html_page.table(NUMBERS[picture.table](table)))
    if TOKEN_PAGES in sources:
        file, about = sources[TOKEN_PAGES]
        links = ', '.join(
            f'<a href="{html.escape(page.name)}">{html.escape(title)}</a>'
            for title, page in write_token_pages(read_table(file), about, out).items()
        )
        parts += ['<h2>Figure 7, left: which tokens think</h2>', f'<p>{html.escape(about)} A paragraph of {links}.</p>']
    parts += draw_studies(studies, out)
    index = out / 'index.html'
    write_text(html_page.page('ITT: figures', parts), index)
    return index


def write_token_pages(table: pd.DataFrame, about: str, out: Path) -> dict[str, Path]:
    """A page for each passage of the table, ``OUT/tokens_<first word of its title>.html``, by its title."""
    pages = {}
    for title, rows in table.groupby('title', sort=False):
        pages[str(title)] = out / f'tokens_{str(title).split()[0]}.html'
        page = token_page([Passage.from_table(rows)], rows['rule'].iloc[0], about)
        write_text(page, pages[str(title)])
    return pages


def _beside_paper(table: pd.DataFrame) -> list[dict[str, str]]:
    """Table 2 and 4: the settings measured here, with the paper's perplexity where it has the setting."""
    paper = pd.DataFrame.from_dict(elastic_rows(), orient='index')
    return [
        {
            'shares of the steps': row['ratios'] + (' (trained)' if row['ratios'] == row['trained'] else ''),
            'paper: TFLOPs': f'{paper["flops"][row["ratios"]]:.2f}' if row['ratios'] in paper.index else '',
            'paper: perplexity': f'{paper["perplexity"][row["ratios"]]:.2f}' if row['ratios'] in paper.index else '',
            'here: GFLOPs': f'{row["paper_gflops"]:.2f}',
            'perplexity, causal rule': f'{row["perplexity_threshold"]:.2f}',
            'perplexity, top-k rule': f'{row["perplexity_top_k"]:.2f}',
        }
        for _, row in table.iterrows()
    ]


def _rounded(table: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {name: f'{value:.3f}' if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in table.to_dict('records')
    ]


NUMBERS: dict[str, Callable[[pd.DataFrame], list[dict[str, str]]]] = {
    'elastic': _beside_paper,
    'depth_and_loss': _rounded,
    'depth_and_loss_by_step': _rounded,
}
"""Tables that the page shows beneath their picture."""
