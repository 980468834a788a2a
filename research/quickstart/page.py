"""The page of the quickstart: one self-contained HTML file."""

from __future__ import annotations

import io
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from itt_composer.analysis import html_page
from itt_composer.analysis.figure_style import COLOURS, tidy
from itt_composer.analysis.token_page import token_parts
from itt_composer.atomic import write_text
from research.quickstart.results import Result
from research.quickstart.samples import TEMPERATURE, Samples

INTRODUCTION = Markup(
    '<h1>Inner Thinking Transformer: quickstart</h1>'
    '<p>Three small models, trained on the same batches from the same initial weights: a <b>dense baseline</b> '
    '(LLaMA); <b>Loop x4</b>, which runs every other layer four times on every token; and <b>ITT x4</b>, which runs it '
    'again up to three times, each time on the half of the tokens with the highest router scores.</p>'
    '<ul><li>A <b>gate value</b> is the number between 0 and 1 that a router gives a token; the result of an extra '
    'step is multiplied by it.</li>'
    '<li>A <b>step encoding</b> is a learned vector for each step; the result of the step is multiplied by '
    'it.</li></ul>'
    '<p>These runs show that everything works. They are far too short to say which model is better.</p>'
)
COLUMNS = Markup(
    '<p>GFLOPs: forward pass of one sequence, exact count. Losses: nats per token of held-out text. '
    "<b>Threshold</b> routing uses only a token's own score, so this is the loss of a left-to-right model. "
    '<b>Top-k</b> routing, used in training, compares it with later tokens too (non-causal).</p>'
)
CAPTIONS = {
    'router/gate_values': 'Gate values of ITT x4 in the last training batch. Layers count from 0.',
    'step_encoding/means': 'Mean of the step encodings of ITT x4 after training. They start at 1 for the base pass '
    'and at 0.1 for each extra step.',
}


def write_page(results: list[Result], samples: Samples, commands: list[tuple[str, str]], path: Path) -> Path:
    """Write the page for the three models and return its path.

    Args:
        results: the dense baseline first.
        samples: what the models did with a held-out text.
        commands: next commands, each with its explanation.
        path: the file.
    """
    parts = [
        INTRODUCTION,
        Markup('<h2>Losses</h2>'),
        html_page.table([result.row() for result in results]),
        COLUMNS,
        html_page.figure(_loss_curves(results), 'Loss of each training batch (line, mean of the last ten) and on '
                         f'held-out text (markers). Grey: {results[0].name}.'),
        Markup('<h2>Where the extra steps of ITT x4 run</h2>'),
        *(Markup(part) for part in token_parts([samples.passage], 'threshold')),
        Markup('<h2>Sample continuations</h2><p>Of the start of the same held-out text, sampled at temperature {}. '
               'After so short a training they are not English yet.</p>').format(TEMPERATURE),
        html_page.table([{'': 'prompt', 'text': samples.prompt}]
                        + [{'': name, 'text': text} for name, text in samples.continuations.items()], prose=True),
        Markup('<h2>What ITT x4 learned</h2>'),
        *(html_page.figure(picture, CAPTIONS.get(name, f'{result.name}: {name}'))
          for result in results for name, picture in sorted(result.pictures.items())),
        Markup('<h2>Held-out loss by domain (threshold)</h2>'),
        html_page.table(
            [
                {'domain': domain, **{result.name: f'{result.domain_losses[domain]:.4f}' for result in results}}
                for domain in results[0].domain_losses
            ]
        ),
        Markup('<h2>Next</h2>'),
        *(Markup('<p>{}</p><pre>{}</pre>').format(text, command) for text, command in commands),
    ]  # fmt: skip
    write_text(html_page.page('ITT quickstart', parts), path)
    return path


def _loss_curves(results: list[Result]) -> bytes:
    """Draw one panel for each model, with the first model in grey behind, so that no curve hides another."""
    figure = Figure(figsize=(5, 1.2 + 1.9 * len(results)), dpi=150, layout='constrained')
    panels = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    behind = results[0]
    for i, (axis, result) in enumerate(zip(panels, results, strict=True)):
        colour = COLOURS[i + 1]
        axis.plot(*_smooth(behind.train_loss, 10), color='#bbbbbb', linewidth=3)
        axis.plot(*_smooth(result.train_loss, 10), color=colour, linewidth=1.3)
        axis.plot(*zip(*result.validation_loss, strict=True), marker='o', color=colour, linestyle='none')
        axis.set_title(result.name, fontsize=11, color=colour, loc='left')
        tidy(axis)
    panels[-1].set_xlabel('batches', fontsize=10)
    figure.supylabel('loss, nats per token', fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def _smooth(curve: list[tuple[int, float]], window: int) -> tuple[list[int], list[float]]:
    """Return batches, and the mean of the last ``window`` values at each."""
    values = [value for _, value in curve]
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [batch for batch, _ in curve], [sum(part) / len(part) for part in recent]
