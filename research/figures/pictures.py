"""Every figure from its table, and a page with all of them beside what the paper says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from itt_composer.analysis import html_page
from itt_composer.analysis.router_weights import plot_router_weights
from itt_composer.analysis.step_encodings import plot_step_encodings
from itt_composer.analysis.token_page import Passage, token_page
from itt_composer.atomic import write_text
from itt_composer.evaluation import sweep
from itt_composer.paper.tables import elastic_rows
from research.figures import accuracy, difficulty, easy_and_hard, logit_lens, over_training
from research.figures.measurements import read_table
from research.figures.studies import draw_studies

Source = tuple[Path, str]
"""A table's file, and a description of what was measured."""
DPI = 200
STORED = 'stored result of another model'
"""Begins the description of a table that was not measured by this call."""


@dataclass(frozen=True)
class Picture:
    """One figure."""

    name: str
    title: str
    table: str
    draw: Callable[[pd.DataFrame], Figure]
    paper: str
    """What the paper says or shows."""


def plot_elastic(table: pd.DataFrame) -> Figure:
    """Plot perplexity against FLOPs; ``table`` has the columns of ``sweep.Setting`` and ``trained``."""
    settings = [sweep.Setting(**row) for row in table.drop(columns='trained').to_dict('records')]  # type: ignore[misc]
    return sweep.plot(settings, table['trained'].iloc[0])


EASY_AND_HARD = (
    'Paper (GPT-2 of 12 layers, no numbers but these): on easy samples the norm decays over the layers 0 to 2 and 11, '
    'and stays below 3 in the layers 3 to 10; on hard ones it oscillates through all layers, with spikes at 3, 5, 7 '
    'and 9 (layers counted from 0, as here).'
)
PICTURES = (
    Picture('figure2', 'Figure 2: gradient nuclear norm, easy against hard samples', 'easy_and_hard',
            easy_and_hard.plot, EASY_AND_HARD),
    Picture('figure2_dense', 'Figure 2, of the dense baseline', 'easy_and_hard_dense', easy_and_hard.plot,
            EASY_AND_HARD),
    Picture('figure5', 'Figure 5: mean accuracy against steps', 'accuracy', accuracy.plot,
            'Paper (Section 4.2): ITT x4 is 1.7, 2.1 and 1.7 points above the dense baseline at 162M, 230M and 466M.'),
    Picture('figure6_left', 'Figure 6, left: perplexity against FLOPs', 'elastic', plot_elastic,
            'Paper: Tables 2 and 4, below; every setting lies between 10.21 and 10.56, the dense baseline at 11.13.'),
    Picture('figure6_middle', 'Figure 6, middle: mean of the step encodings', 'step_encodings', plot_step_encodings,
            'Paper (no numbers): the earlier steps come first, and deeper ones also have high values.'),
    Picture('figure6_middle_over_training', 'Step encodings over the training', 'step_encodings_over_training',
            over_training.plot, 'Not in the paper.'),
    Picture('figure6_right', 'Figure 6, right: gate values', 'router_weights', plot_router_weights,
            'Paper: the distribution for its step 3-2 of ITT x4 (here layer 2, step 2), normal and concentrated at 0.6 '
            'to 0.8 (A.4); 30 to 50 % of the tokens are routed again.'),
    Picture('figure6_right_over_training', 'Gate values over the training', 'router_weights_over_training',
            over_training.plot, 'Not in the paper.'),
    Picture('figure7_right', 'Figure 7, right: probability of the correct token through the layers',
            'logit_lens',
            logit_lens.plot, "Paper: the tokens 'three' and 'stand' of one text, where ITT rises and LLaMA fails; here "
            'the mean over held-out tokens, with a 95 % interval over documents.'),
    Picture('residual_norm', 'Residual-norm growth', 'logit_lens', logit_lens.plot_growth,
            'Not in the paper. What a layer adds has much the same norm everywhere, so a larger residual norm before a '
            'layer means that the layer changes it less.'),
    Picture('depth_and_loss', 'Are tokens with more extra steps harder?', 'depth_and_loss',
            difficulty.plot_correlations, 'Paper (Section 4.4, Figure 7): difficult tokens get slow thinking, easy '
            'ones fast; no measure of it.'),
    Picture('depth_and_loss_by_step', 'To which steps are harder tokens routed?', 'depth_and_loss_by_step',
            difficulty.plot_by_step, 'Paper (Section 4.4): its steps 3-3 and 7-3 (here layers 2 and 6, step 3) '
            'compensate, with simple tokens that earlier steps did not process; the others prefer important ones.'),
)  # fmt: skip
TOKEN_PAGES = 'token_pages'


def draw_all(sources: Mapping[str, Source], studies: Path, out: Path) -> Path:
    """Draw every figure that has a table as PNG and PDF, write the token pages, and an index page.

    Args:
        sources: by the table's name.
        studies: the folder with a folder for each study with stored results.
        out: the folder to write to.

    Returns:
        The index page.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        Markup('<h1>Figures</h1>'),
        Markup(
            '<p>Layers are counted from 0, steps from 1; step 0 is the base pass. Definitions: research/README.md.</p>'
        ),
    ]
    for picture in PICTURES:
        if picture.table not in sources:
            continue
        file, about = sources[picture.table]
        table = read_table(file)
        figure = picture.draw(table)
        with matplotlib.rc_context({'pdf.fonttype': 42}):  # publishers refuse matplotlib's own kind, Type 3
            for suffix in ('png', 'pdf'):
                figure.savefig(out / f'{picture.name}.{suffix}', dpi=DPI)
        stored = f' ({STORED})' if about.startswith(STORED) else ''
        parts.append(Markup('<h2>{}</h2>').format(picture.title + stored))
        parts.append(html_page.figure((out / f'{picture.name}.png').read_bytes(), f'{about} {picture.paper}'))
        if picture.table in NUMBERS:
            parts.append(html_page.table(NUMBERS[picture.table](table)))
    if TOKEN_PAGES in sources:
        file, about = sources[TOKEN_PAGES]
        pages = write_token_pages(read_table(file), about, out)
        links = Markup(', ').join(
            Markup('<a href="{}">{}</a>').format(page.name, title) for title, page in pages.items()
        )
        parts.append(Markup('<h2>Figure 7, left: where extra steps run</h2>'))
        parts.append(Markup('<p>{} A paragraph of {}.</p>').format(about, links))
    parts += draw_studies(studies, out)
    index = out / 'index.html'
    write_text(html_page.page('ITT: figures', parts), index)
    return index


def write_token_pages(table: pd.DataFrame, about: str, out: Path) -> dict[str, Path]:
    """Write a page for each passage, ``OUT/tokens_<first word of its title>.html``; returns them by title."""
    pages = {}
    for title, rows in table.groupby('title', sort=False):
        pages[str(title)] = out / f'tokens_{str(title).split()[0]}.html'
        page = token_page([Passage.from_table(rows)], rows['rule'].iloc[0], about)
        write_text(page, pages[str(title)])
    return pages


def _beside_paper(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the measured settings with the paper's perplexity (Tables 2 and 4) where it has the setting."""
    paper = pd.DataFrame.from_dict(elastic_rows(), orient='index')
    return [
        {
            'token ratios': row['ratios'] + (' (trained)' if row['ratios'] == row['trained'] else ''),
            'paper: TFLOPs': f'{paper["flops"][row["ratios"]]:.2f}' if row['ratios'] in paper.index else '',
            'paper: perplexity': f'{paper["perplexity"][row["ratios"]]:.2f}' if row['ratios'] in paper.index else '',
            'here: GFLOPs': f'{row["paper_gflops"]:.2f}',
            'perplexity, threshold': f'{row["perplexity_threshold"]:.2f}',
            'perplexity, top-k': f'{row["perplexity_top_k"]:.2f}',
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
"""Tables that the page shows below their figure."""
