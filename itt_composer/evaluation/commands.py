"""``itt eval``, ``calibrate``, ``sweep`` and ``tokens``: their options, checked before torch is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from itt_composer.atomic import check_writable
from itt_composer.checks import check_choice
from itt_composer.one_line import one_line_errors
from itt_composer.options import SELECTION
from itt_composer.paper.tables import paper_rows
from itt_composer.ratios import parse_ratios

MODEL = typer.Argument(metavar='MODEL', help='Exported folder of an ITT model.', show_default=False)
DATA = typer.Option(help='Folder that `itt data` wrote, for its validation sequences.')


def evaluate(
    model: Annotated[
        list[Path],
        typer.Option(help='Exported folder or checkpoint; several are seeds of one model.', show_default=False),
    ],
    eval_data: Annotated[
        Path | None,
        typer.Option(
            help='Folder that `itt eval-data` wrote; with --task gsm8k, the folder above gsm8k. Default: the data sets '
            'of the hub.'
        ),
    ] = None,
    token_ratios: Annotated[
        str | None,
        typer.Option(
            help="Fraction of tokens routed to each step, 0.7/0.7/0.9; 0 removes it. Default: the training's."
        ),
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help='Routing: threshold (causal), top_k or top_p. Default: that of the model.')
    ] = None,
    task: Annotated[
        str | None, typer.Option(help='gsm8k: exact match of generated answers. Default: the ten tasks of Table 1.')
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help='Examples before a question of gsm8k. Default: 0.')] = None,
    chat: Annotated[bool, typer.Option('--chat', help="Ask gsm8k with the tokenizer's chat template.")] = False,
    row: Annotated[
        str | None, typer.Option(help='Row of Table 1 to compare with, such as itt_x4_162m. Default: the nearest.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help='Folder for table1.csv and scores.csv. Default: one under eval_results.')
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help='Documents per task. Default: all.')] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help='Tokens of one forward pass.')] = None,
) -> None:
    """Score models on the ten tasks of Table 1 through lm-eval and write the row, or on GSM8K."""
    with one_line_errors('eval'):
        if importlib.util.find_spec('lm_eval') is None:
            raise ValueError("lm-eval is not installed; in a clone of itt_composer, run: pip install '.[eval]'")
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise ValueError('one process scores a model; start one command per GPU, each with its --model and --out')
        for path in model:
            _check_exists(path)
        _check_thinking(selection, token_ratios)
        if row is not None:
            check_choice('row', row, list(paper_rows()))
        if task is not None:
            check_choice('task', task, ('gsm8k',))
        for option, given, fits in (('row', row, task is None), ('shots', shots, task), ('chat', chat or None, task)):
            if given is not None and not fits:
                raise ValueError(f'{option}: belongs to {"the ten tasks" if task else "--task gsm8k"}; leave it out')
    if task is not None:
        from itt_composer.evaluation import gsm8k

        gsm8k.main(model, eval_data, token_ratios, selection, shots or 0, chat, out, limit, batch_tokens)
        return
    from itt_composer.evaluation import score

    score.main(model, eval_data, token_ratios, selection, row, out, limit, batch_tokens)


def calibrate(
    model: Annotated[Path, MODEL],
    ratios: Annotated[
        list[str], typer.Option(help='Fraction of tokens per step, 0.7/0.7/0.9; may be repeated.', show_default=False)
    ],
    data: Annotated[Path, DATA] = Path('data'),
    sequences: Annotated[
        int | None,
        typer.Option(min=2, help='Half of them set the thresholds, half check them. Default: 64, or all if fewer.'),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help='Sequences per forward pass.')] = 8,
) -> None:
    """Set thresholds for other token ratios from held-out sequences, and write them into the model's config."""
    with one_line_errors('calibrate'):
        _check_exists(model)
        _check_thinking(None, *ratios)
        check_writable(model / 'config.json')
    from itt_composer.evaluation.calibrate import main

    main(model, data, ratios, sequences, batch_size)


def sweep(
    model: Annotated[Path, MODEL],
    data: Annotated[Path, DATA] = Path('data'),
    ratios: Annotated[list[str] | None, typer.Option(help='More settings, 0.9/0.5/0.1; may be repeated.')] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=2, help='Half of them set the thresholds, half are evaluated. Default: 64, or all if fewer.'),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help='Sequences per forward pass.')] = 4,
    out: Annotated[Path, typer.Option(help='Where to write OUT.csv and OUT.png.')] = Path('sweep'),
) -> None:
    """Evaluate a model at the token ratios of Tables 2 and 4, under threshold and top-k routing."""
    with one_line_errors('sweep'):
        _check_exists(model)
        _check_thinking(None, *(ratios or []))
        if not out.name:
            raise ValueError(f'out: {out}: a folder; set the beginning of a name, such as {out / "sweep"}')
        check_writable(out.with_name(f'{out.name}.csv'))
    from itt_composer.evaluation.sweep import main

    main(model, data, ratios, sequences, batch_size, out)


def tokens(
    model: Annotated[
        Path, typer.Argument(metavar='MODEL', help='Checkpoint or exported folder of an ITT model.', show_default=False)
    ],
    text: Annotated[str, typer.Option(help='A text, a file with one, or - for standard input.', show_default=False)],
    selection: Annotated[str, typer.Option(help='threshold (causal), or top_k or top_p (non-causal).')] = 'threshold',
    ratios: Annotated[
        str | None, typer.Option(help='Fraction of tokens per step, 0.7/0.7/0.9; 0 removes one. Default: the model’s.')
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help='Longest text shown, in tokens.')] = 4096,
    out: Annotated[Path, typer.Option(help='The page to write.')] = Path('tokens.html'),
) -> None:
    """Write a page with the tokens of a text, shaded by their number of extra steps, and their gate values."""
    with one_line_errors('tokens'):
        check_writable(out)
        _check_exists(model)
        _check_thinking(selection, ratios)
    from itt_composer.evaluation.tokens import main

    main(model, text, selection, ratios, limit, out)


def _check_exists(model: Path) -> None:
    if not model.exists():
        raise ValueError(f'{model}: no such file or folder; set an exported folder or a checkpoint')


def _check_thinking(selection: str | None, *ratios: str | None) -> None:
    if selection is not None:
        check_choice('selection', selection, SELECTION)
    for text in ratios:
        if text is not None:
            parse_ratios(text)
