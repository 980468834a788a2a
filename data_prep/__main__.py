"""``python -m data_prep``: text in, shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.budget import budgets
from data_prep.conversion import convert
from data_prep.input.domains import missing_domains

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_console = Console()


@app.command()
def main(
    out: Annotated[Path, typer.Option(help='Folder for shards, tokenizer and manifest.')],
    source: Annotated[
        str | None,
        typer.Option(
            help='A folder with a sub-folder for each domain of .jsonl, .jsonl.gz, .jsonl.zst or .parquet files with a '
            'text field or column; a .json or .yaml file {domain: [file, ...]}; or hf: and a Hugging Face data set, a '
            'folder or a hub id. Without it: a small corpus of sources, documentation and package descriptions found '
            'on this machine.'
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
    budget_tokens: Annotated[
        int, typer.Option(help='Tokens of the training run; what each domain lacks for it is shown.')
    ] = 50_000_000_000,
    workers: Annotated[int | None, typer.Option(help='Processes; one for each core by default.')] = None,
    engine: Annotated[
        str,
        typer.Option(help='local: this machine. ray: the cluster that RAY_ADDRESS names, or one started here.'),
    ] = 'local',
    max_bad_lines: Annotated[int, typer.Option(help='Lines without a document to pass over before giving up.')] = 100,
    remote: Annotated[
        str | None, typer.Option(help='Where to copy OUT when it is whole: s3://, gs://, oci://... or a folder.')
    ] = None,
) -> None:
    """Convert text into MDS shards of token rows.

    Writes OUT/train/DOMAIN, OUT/validation/DOMAIN, OUT/tokenizer and, when all is done, OUT/manifest.json. The shards
    are the same whatever the engine and the number of workers. Killed, it goes on where it was when run again.
    """

    def announce(domains: dict[str, Any]) -> None:
        _show_budgets(domains, {name: domain['estimated_tokens'] for name, domain in domains.items()}, budget_tokens)

    try:
        if budget_tokens < 1:
            raise ValueError(f'BUDGET_TOKENS: {budget_tokens} is less than 1')
        if remote is not None:
            from data_prep.upload import check_remote, upload  # streaming takes long to import

            check_remote(remote)
        manifest = convert(
            source,
            out,
            tokenizer,
            seq_len,
            validation_tokens,
            workers,
            max_bad_lines,
            engine=engine,
            announce=announce,
        )
        _show(manifest, out, budget_tokens)
        if remote is not None:
            upload(out, remote, manifest)
            _console.print(f'copied to {remote}', markup=False)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from error


def _show_budgets(domains: dict[str, Any], training_tokens: dict[str, float], total: int) -> None:
    proportions = {name: domain['proportion'] for name, domain in domains.items()}
    table = Table(title=f'a run of {total:,} tokens', title_justify='left')
    table.add_column('domain', no_wrap=True)
    for column in ('proportion', 'tokens', 'there', 'lacking', 'epochs'):
        table.add_column(column, justify='right')
    for name, budget in budgets(proportions, training_tokens, total).items():
        numbers = map(_short, (budget.tokens, budget.there, budget.lacking))
        table.add_row(name, f'{proportions[name]:.3f}', *numbers, f'{budget.epochs:,.2f}')
    _console.print(table)
    if missing := missing_domains(domains):
        _console.print(f'note: the source has no {", ".join(missing)}; the others take their share')


def _short(tokens: float) -> str:
    """A few digits and a unit: all columns fit 80 characters."""
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if tokens >= size:
            return f'{tokens / size:.1f} {unit}'
    return f'{tokens:.0f}'


def _show(manifest: dict[str, Any], out: Path, budget_tokens: int) -> None:
    table = Table(title='shards', title_justify='left')
    for column in ('domain', 'split'):
        table.add_column(column, no_wrap=True)
    columns = ('documents', 'bytes', 'tokens', 'rows')
    for column in columns:
        table.add_column(column, justify='right')
    for name, domain in manifest['domains'].items():
        for split in ('train', 'validation'):
            table.add_row(name, split, *(f'{domain[split][column]:,}' for column in columns))
    _console.print(table)
    training = {name: domain['train']['tokens'] for name, domain in manifest['domains'].items()}
    _show_budgets(manifest['domains'], training, budget_tokens)
    for line in manifest['bad_lines']:
        _console.print(f'bad line: {line["file"]}, line {line["line"]}: {line["reason"]}', markup=False)
    for name, domain in manifest['domains'].items():
        if domain['validation']['rows'] == 0:
            _console.print(f'note: domain {name} is too small for validation rows')
    _console.print(f'{out / "manifest.json"} says the rest', markup=False)


if __name__ == '__main__':
    app()
