"""``python -m data_prep``: text in, shards out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.conversion import convert
from data_prep.input.domains import missing_domains

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_console = Console()
# At most this number of things left out is printed; the manifest has all.
_LINES = 20


@app.command()
def main(
    out: Annotated[Path, typer.Option(help='Folder for shards, tokenizer and manifest.')] = Path('data'),
    source: Annotated[
        str | None,
        typer.Option(
            help='A folder with a sub-folder per domain of JSON lines (.jsonl, also compressed), .parquet or .arrow '
            'files. Or a .json or .yaml file with the files of each domain. Or hf: and a Hugging Face data set, '
            'a folder or a hub id. Without it: a small corpus of sources, documentation and package descriptions found '
            'on this machine.'
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help='A tokenizer.model, a folder with one or with a Hugging Face tokenizer, or a hub id. '
            'bpe:2048: a byte-level BPE of 2048 tokens, trained on the corpus; without it: bpe:4096.'
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help='Tokens per sequence.')] = 4096,
    validation_tokens: Annotated[
        int, typer.Option(help='Tokens to hold out, over all domains; never over a tenth of a domain.')
    ] = 2_000_000,
    validation_shares: Annotated[
        str,
        typer.Option(
            help='How the domains divide the validation tokens. recipe: as they divide a training run. equal: each the '
            'same, as in Sheared-LLaMA.'
        ),
    ] = 'recipe',
    text_field: Annotated[str, typer.Option(help='Field or column that holds the text.')] = 'text',
    budget_tokens: Annotated[
        int, typer.Option(help='Tokens of the planned training; a table shows how many each domain lacks.')
    ] = 50_000_000_000,
    workers: Annotated[
        int | None, typer.Option(help='Processes; by default one per CPU that this process may use.')
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help='local: this machine. ray: the cluster that RAY_ADDRESS names, or one started here.'),
    ] = 'local',
    max_bad_lines: Annotated[int, typer.Option(help='Stop if more than this number of lines have no text.')] = 100,
    remote: Annotated[
        str | None, typer.Option(help='Where to copy OUT when it is complete: s3://, gs://, oci://... or a folder.')
    ] = None,
) -> None:
    """Convert text into MDS shards of token sequences.

    Writes OUT/train/DOMAIN, OUT/validation/DOMAIN, OUT/tokenizer and, when all is done, OUT/manifest.json.

    The shards are the same whatever the engine and the number of workers. A killed conversion continues when it is run
    again.
    """

    def announce(domains: dict[str, Any]) -> None:
        estimated = {name: domain['estimated_tokens'] for name, domain in domains.items()}
        _show_budgets('estimated token budget', domains, estimated, budget_tokens)

    out = out.expanduser()
    try:
        if budget_tokens < 1:
            raise ValueError(f'--budget-tokens: expected at least 1, got {budget_tokens}')
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
            text_field=text_field,
            validation_shares=validation_shares,
        )
        _show(manifest, out, budget_tokens)
        if remote is not None:
            upload(out, remote, manifest)
            _console.print(f'copied to {remote}', markup=False)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from error


def _show_budgets(title: str, domains: dict[str, Any], training_tokens: dict[str, float], total: int) -> None:
    table = Table(title=f'{title} of a run of {total:,} tokens', title_justify='left')
    table.add_column('domain', no_wrap=True)
    for column in ('proportion', 'tokens', 'available', 'missing', 'epochs'):
        table.add_column(column, justify='right')
    for name, domain in domains.items():
        tokens, available = domain['proportion'] * total, training_tokens[name]
        numbers = map(_short, (tokens, available, max(tokens - available, 0)))
        epochs = tokens / available if available else math.inf
        table.add_row(name, f'{domain["proportion"]:.3f}', *numbers, f'{epochs:,.2f}')
    _console.print(table)
    if missing := missing_domains(domains):
        _console.print(f'note: the source has no {", ".join(missing)}; the other domains get their tokens')


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
    for column in (*columns[:-1], 'sequences'):
        table.add_column(column, justify='right')
    for name, domain in manifest['domains'].items():
        for split in ('train', 'validation'):
            table.add_row(name, split, *(f'{domain[split][column]:,}' for column in columns))
    _console.print(table)
    training = {name: domain['train']['tokens'] for name, domain in manifest['domains'].items()}
    _show_budgets('token budget', manifest['domains'], training, budget_tokens)
    for line in manifest['bad_lines']:
        _console.print(f'bad line: {line["file"]}, line {line["line"]}: {line["reason"]}', markup=False)
    left_out = manifest['source']['left_out']
    for one in left_out[:_LINES]:
        name = ''.join(character if character.isprintable() else '?' for character in one['path'])
        _console.print(f'left out: {name}: {one["reason"]}', markup=False)
    if len(left_out) > _LINES:
        _console.print(f'left out: {len(left_out) - _LINES} more; the manifest names them')
    for name, domain in manifest['domains'].items():
        if domain['empty_documents']:
            _console.print(f'left out: {domain["empty_documents"]:,} empty documents of domain {name}', markup=False)
        if domain['validation']['rows'] == 0:
            _console.print(f'note: domain {name} is too small for a validation sequence', markup=False)
    _console.print(f'details: {out / "manifest.json"}', markup=False)


if __name__ == '__main__':
    app()
