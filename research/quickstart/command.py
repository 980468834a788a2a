"""``python -m research quickstart``: convert text, train three tiny models with ``composer``, write a page.

Each part is the command a user would type; nothing here trains by itself. What is done is not done again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from research.quickstart.page import write_page
from research.quickstart.results import Result, read_result, write_csv

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_FILES = {'LLaMA': 'llama_tiny', 'Loop x4': 'loop_x4_tiny', 'ITT x4': 'itt_x4_tiny'}
VALIDATION_TOKENS = 200_000
# glibc hands buffers of this size, the logits, back to the system after each use; that costs a third of a CPU's step.
KEEP_BUFFERS = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(4 << 30)}
console = Console()


def main(
    out: Annotated[Path, typer.Option(help='Folder for everything this makes.')] = Path('quickstart'),
    source: Annotated[
        Path | None, typer.Option(help='RedPajama tree; without it, text that every Python installation has.')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer of the data; without it, a small BPE trained on the text.')
    ] = None,
) -> None:
    """Convert, train the three models on the same batches, and write a page with their losses and what ITT learnt."""
    start = time.monotonic()
    data = out / 'data'
    convert(data, source, tokenizer)
    results = []
    for name, run_file in RUN_FILES.items():
        train(name, run_file, data, out)
        results.append(read_result(name, REPOSITORY / 'yamls' / f'{run_file}.yaml', data, out / 'runs'))
    write_csv(results, out / 'results.csv')
    page = write_page(results, out / 'index.html')
    console.print(summary(results))
    console.print(f'{time.monotonic() - start:.0f} s in all. The page: {page.resolve()}', highlight=False)


def convert(data: Path, source: Path | None, tokenizer: str | None) -> None:
    """``python -m data_prep``: the shards, as long as the tiny recipe wants them."""
    recipe = OmegaConf.load(REPOSITORY / 'yamls' / 'parts' / 'recipe' / 'tiny.yaml')
    tokens = int(recipe.max_duration.removesuffix('ba')) * recipe.global_train_batch_size * recipe.max_seq_len
    arguments = ['--out', str(data), '--seq-len', str(recipe.max_seq_len), '--budget-tokens', str(tokens)]
    arguments += ['--validation-tokens', str(VALIDATION_TOKENS)]
    arguments += ['--source', str(source)] if source else []
    arguments += ['--tokenizer', tokenizer] if tokenizer else []
    if subprocess.run([sys.executable, '-m', 'data_prep', *arguments]).returncode:
        sys.exit(1)


def train(name: str, run_file: str, data: Path, out: Path) -> None:
    """``composer train.py yamls/<run_file>.yaml``, with a progress bar; its output goes to a file."""
    log = out / f'{run_file}.log'
    composer = Path(sys.executable).with_name('composer')
    places = [f'variables.data={data.resolve()}', f'variables.runs={(out / "runs").resolve()}']
    command = [str(composer), '-n', '1', 'train.py', f'yamls/{run_file}.yaml', *places]
    console.print(f'{composer} -n 1 train.py yamls/{run_file}.yaml ... > {log}', highlight=False)
    columns = (TextColumn(f'{name:8}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with open(log, 'w') as sink, Progress(*columns, console=console) as progress:
        bar = progress.add_task('', total=None)
        environment = {**KEEP_BUFFERS, **os.environ}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            if done := re.findall(r'\[batch=(\d+)/(\d+)\]', log.read_text()):
                progress.update(bar, completed=int(done[-1][0]), total=int(done[-1][1]))
    if process.returncode:
        console.print(''.join(log.read_text().splitlines(keepends=True)[-15:]), highlight=False, markup=False)
        sys.exit(f'training {run_file} failed; the whole output is in {log}')


def summary(results: list[Result]) -> Table:
    """The comparison, for the terminal."""
    rows = [result.row() for result in results]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table
