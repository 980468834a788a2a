"""``python -m data_prep``: text in, shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.conversion import convert
from data_prep.domains import missing_domains

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_console = Console()


@app.command()
def main(
    out: Annotated[Path, typer.Option(help='Folder for shards, tokenizer and manifest.')],
    source: Annotated[
        Path | None,
        typer.Option(
            help='Folder with a sub-folder for each domain of .jsonl, .jsonl.gz or .jsonl.zst files with a text field. '
            'Without it: a small corpus of sources, documentation and package descriptions found on this machine.'
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help='A tokenizer.model, a folder with one or with a Hugging Face tokenizer, or a hub id. '
            'Without it: a small byte-level BPE trained on the corpus.'
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help='Tokens in a row.')] = 4096,
    validation_tokens: Annotated[
        int, typer.Option(help='Tokens to hold out, over all domains; never over a tenth of a domain.')
    ] = 2_000_000,
    workers: Annotated[int | None, typer.Option(help='Processes; one for each core by default.')] = None,
    max_bad_lines: Annotated[int, typer.Option(help='Lines without a document to pass over before giving up.')] = 100,
) -> None:
    """Convert text into MDS shards of token rows.

    Writes OUT/train/DOMAIN, OUT/validation/DOMAIN, OUT/tokenizer and, when all is done, OUT/manifest.json. The shards
    are the same whatever the number of workers. Killed, it goes on where it was when run again.
    """
    try:
        manifest = convert(source, out, tokenizer, seq_len, validation_tokens, workers, max_bad_lines)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from error
    _show(manifest, out)


def _show(manifest: dict[str, Any], out: Path) -> None:
    table = Table()
    for column in ('domain', 'split'):
        table.add_column(column, no_wrap=True)
    columns = ('documents', 'bytes', 'tokens', 'rows')
    for column in columns:
        table.add_column(column, justify='right')
    for name, domain in manifest['domains'].items():
        for split in ('train', 'validation'):
            table.add_row(name, split, *(f'{domain[split][column]:,}' for column in columns))
    _console.print(table)
    for line in manifest['bad_lines']:
        _console.print(f'bad line: {line["file"]}, line {line["line"]}: {line["reason"]}', markup=False)
    for name, domain in manifest['domains'].items():
        if domain['validation']['rows'] == 0:
            _console.print(f'note: domain {name} is too small for validation rows')
    if missing := missing_domains(manifest['domains']):
        _console.print(f'note: the source has no {", ".join(missing)}')
    _console.print(f'{out / "manifest.json"} says the rest', markup=False)


if __name__ == '__main__':
    app()
