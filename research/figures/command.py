"""The paper's figures in one command: ``make figures``, or ``python -m research figures``.

Each measurement whose inputs are set writes its tables to ``OUT/tables``; each picture is drawn from such a table, or
from the one stored with the repository. What had neither is named, with what to set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from itt_composer.atomic import write_json
from itt_composer.one_line import one_line_errors
from research.figures.measurements import MEASUREMENTS, Inputs, write_table
from research.figures.pictures import STORED, Source, draw_all

RESULTS = Path(__file__).resolve().parents[2] / 'research' / 'results'
ABOUT = 'about.json'
HINTS = {
    'model': '--model <checkpoint or exported folder of an ITT model>',
    'dense': '--dense <the same of a dense baseline trained on the same data>',
    'data': '--data <folder that itt data wrote>',
    'aqua': '--aqua <folder with aqua_dev.jsonl and aqua_test.jsonl>',
    'tensorboard': '--tensorboard <TensorBoard folder of one run>',
    'scores': '--scores <folder with a folder per model from itt eval --out>',
}


def measure_all(inputs: Inputs, tables: Path, console: Console) -> dict[str, str]:
    """Run the measurements whose inputs are set, and write their tables and what they are of.

    Returns:
        For each table that was not made, why.
    """
    absent: dict[str, str] = {}
    for measurement in MEASUREMENTS:
        missing = [HINTS[need] for need in measurement.needs if need not in inputs.given()]
        if missing:
            absent |= dict.fromkeys(measurement.tables, f'set {", ".join(missing)}')
            continue
        console.print(f'measuring {", ".join(measurement.tables)}', highlight=False)
        try:
            made, about = measurement.measure(inputs)
        except ValueError as error:
            absent |= dict.fromkeys(measurement.tables, f'failed: {error}')
            continue
        for name, table in zip(measurement.tables, made, strict=True):
            write_table(table, tables / f'{name}.csv')
            texts = read_about(tables) | {name: about}
            write_json(dict(sorted(texts.items())), tables / ABOUT)
    return absent


def read_about(tables: Path) -> dict[str, str]:
    """Return the description of each table of a folder."""
    file = tables / ABOUT
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}


def main(
    model: Annotated[Path | None, typer.Option(help='Checkpoint or exported folder of an ITT model.')] = None,
    dense: Annotated[Path | None, typer.Option(help='The same of a dense baseline trained on the same data.')] = None,
    data: Annotated[Path | None, typer.Option(help='Folder that `itt data` wrote.')] = None,
    aqua: Annotated[Path | None, typer.Option(help='Folder with aqua_dev.jsonl and aqua_test.jsonl.')] = None,
    tensorboard: Annotated[Path | None, typer.Option(help='TensorBoard folder of one run.')] = None,
    scores: Annotated[Path | None, typer.Option(help='Folder with a folder per model from `itt eval --out`.')] = None,
    sequences: Annotated[int, typer.Option(help='Held-out sequences; of each domain where domains are compared.')] = 64,
    samples: Annotated[int, typer.Option(help='Test samples of AQuA, at most.')] = 254,
    selection: Annotated[str, typer.Option(help='threshold, top_k or top_p.')] = 'threshold',
    results: Annotated[
        Path, typer.Option(help='Stored tables: figures/, drawn where none are measured, and a folder for each study.')
    ] = RESULTS,
    out: Annotated[Path, typer.Option(help='Where to write pictures, tables and index.html.')] = Path('figures'),
) -> None:
    """Measure what the inputs allow, draw it, and draw the rest from stored tables."""
    console, tables = Console(), out / 'tables'
    inputs = Inputs(model, dense, data, aqua, tensorboard, scores, sequences, samples, selection)
    for name in inputs.given():
        if not getattr(inputs, name).exists():
            raise SystemExit(f'figures: {name}: {getattr(inputs, name)} is missing; set {HINTS[name]}')
    if sequences < 2:
        raise SystemExit(f'figures: sequences: expected 2 or more, got {sequences}')
    absent = measure_all(inputs, tables, console)
    sources: dict[str, Source] = {}
    for folder, prefix in ((results / 'figures', f'{STORED}: '), (tables, '')):  # the later one replaces the first
        about = read_about(folder)
        sources |= {file.stem: (file, prefix + about.get(file.stem, '')) for file in sorted(folder.glob('*.csv'))}
    with one_line_errors('figures'):
        index = draw_all(sources, results, out)
    for name, why in absent.items():
        place = f'drawn from {sources[name][0]}' if name in sources else 'no figure'
        console.print(f'not measured: {name} ({why}); {place}', highlight=False, soft_wrap=True)
    console.print(f'{index}', highlight=False, soft_wrap=True)
    if any(why.startswith('failed') for why in absent.values()):
        raise SystemExit(1)
