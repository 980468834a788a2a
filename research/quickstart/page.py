"""The quickstart's page: one self-contained HTML file."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from itt_composer.analysis import html_page
from itt_composer.analysis.figure_style import line_style
from research.quickstart.results import Result

CAPTIONS = {
    'router/weights': 'Router weights of ITT x4 in the last recorded batch. "3-2" is step 2 of layer 3; a step runs on '
    'the tokens to which its router gives the highest weights.',
    'step_encoding/means': 'Mean of the step encodings phi of ITT x4 at the end. The first pass’s start at one, '
    'a step’s at 0.1.',
}


def write_page(results: list[Result], path: Path) -> Path:
    """Write the page for the three models and return its path."""
    parts = [
        '<h1>Inner Thinking Transformer: quickstart</h1>',
        '<p>Three small models, trained on the same batches from the same initial weights. A plain LLaMA; Loop x4, '
        'which runs every other layer four times on every token; and ITT x4, which runs it again up to three times on '
        'the half of the tokens that its router picks. Evaluation lets a token think when its own score passes a '
        'threshold, so that the loss is that of a left-to-right model; the rule of the training, the top k of a '
        'sequence, looks ahead and is given beside it. At this size and length the losses show that everything works; '
        'they say little about which model is better.</p>',
        html_page.table([result.row() for result in results]),
        '<p>GFLOPs are those of a forward pass of one sequence, counted exactly; losses are in nats per token of '
        'validation text; seconds are those of training, without start-up and evaluation.</p>',
        html_page.figure(_loss_curves(results), 'Loss in nats per token: of each training batch, smoothed over ten '
                         '(lines), and of the validation rows (markers).'),
        '<h2>Evaluation loss per domain</h2>',
        html_page.table(
            [
                {'domain': domain, **{result.name: f'{result.domain_losses[domain]:.4f}' for result in results}}
                for domain in results[0].domain_losses
            ]
        ),
    ]  # fmt: skip
    for result in results:
        for name, picture in sorted(result.pictures.items()):
            parts.append(html_page.figure(picture, CAPTIONS.get(name, f'{result.name}: {name}')))
    path.write_text(html_page.page('ITT quickstart', parts), encoding='utf-8')
    return path


def _loss_curves(results: list[Result]) -> bytes:
    figure = Figure(figsize=(8, 4.2), dpi=110, layout='constrained')
    axes = figure.subplots()
    for i, result in enumerate(results):
        style = line_style(i)
        marker = style.pop('marker')
        steps, losses = zip(*result.train_loss, strict=True)
        axes.plot(steps, _smooth(losses, 10), linewidth=1, alpha=0.6, **style)
        steps, losses = zip(*result.validation_loss, strict=True)
        axes.plot(steps, losses, marker=marker, color=style['color'], linestyle='none')
        axes.plot([], [], marker=marker, label=result.name, **style)
    axes.set_xlabel('batches')
    axes.set_ylabel('loss, nats per token')
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def _smooth(values: tuple[float, ...], window: int) -> list[float]:
    """Mean of the last ``window`` values."""
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in recent]
