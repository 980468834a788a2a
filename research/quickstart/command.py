"""``python -m research quickstart``: convert text, train three tiny models with ``composer``, write a page.

Each part is a command that a user would type. Finished parts are not repeated.
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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from itt_composer.config.run_file import resolve_model
from itt_composer.flops import Decoder, exact_flops
from research.quickstart.page import write_page
from research.quickstart.results import Result, read_result, write_csv

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_FILES = {'dense baseline (LLaMA)': 'llama_tiny', 'Loop x4': 'loop_x4_tiny', 'ITT x4': 'itt_x4_tiny'}
VALIDATION_TOKENS = 200_000
# glibc returns buffers as large as the logits to the system after each use, which costs a third of a step on a CPU.
KEEP_BUFFERS = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(4 << 30)}
BATCH, LOSS = re.compile(r'\[batch=(\d+)/(\d+)\]'), re.compile(r'\] loss ([\d.]+)')
console = Console(soft_wrap=True, highlight=False)


def main(
    out: Annotated[Path, typer.Option(help='Folder for everything this makes.')] = Path('quickstart'),
    source: Annotated[
        Path | None, typer.Option(help='RedPajama tree; without it, text that every Python installation has.')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='Tokenizer of the data; without it, a small BPE trained on the text.')
    ] = None,
) -> None:
    """Convert text, train the three models on the same batches, and write a page with losses and routed tokens."""
    start, data = time.monotonic(), out / 'data'
    console.print('[1/3] converting text to shards')
    convert(data, source, tokenizer)
    console.print(
        f'[2/3] training {len(RUN_FILES)} models; each first imports Composer, which takes about half a minute'
    )
    results = []
    left = TimeLeft(data)
    for name, run_file in RUN_FILES.items():
        train(name, run_file, data, out, left)
        results.append(read_result(name, REPOSITORY / 'yamls' / f'{run_file}.yaml', data, out / 'runs'))
    write_csv(results, out / 'results.csv')
    console.print('[3/3] sample continuations and the page')
    from research.quickstart.samples import sample

    checkpoints = {name: out / 'runs' / run_file / 'checkpoints' for name, run_file in RUN_FILES.items()}
    page = write_page(results, sample(checkpoints, data), next_commands(out, data), out / 'index.html')
    console.print(summary(results))
    console.print(f'done in {(time.monotonic() - start) / 60:.1f} min; open {page.resolve()}')


def next_commands(out: Path, data: Path) -> list[tuple[str, str]]:
    """Return what to try next, each with its command."""
    itt, dense = (out / 'runs' / name / 'checkpoints' for name in ('itt_x4_tiny', 'llama_tiny'))
    return [
        ('The same picture of your own text:', f"make tokens MODEL={itt} TEXT='any text, or a file'"),
        ("The paper's figures, measured on these models:", f'make figures MODEL={itt} DENSE={dense} DATA={data}'),
        ('A folder for Hugging Face:', f'make export CHECKPOINT={itt} OUT=exported'),
        ('A model of Table 1, on 8 GPUs:',
         'make data SOURCE=<redpajama> OUT=data TOKENIZER=<tokenizer.model>\n'
         '.venv/bin/itt train itt_x4_162m -n 8'),
    ]  # fmt: skip


def convert(data: Path, source: Path | None, tokenizer: str | None) -> None:
    """Run ``python -m data_prep`` for as many tokens as the tiny recipe uses."""
    recipe = OmegaConf.load(REPOSITORY / 'yamls' / 'parts' / 'recipe' / 'tiny.yaml')
    tokens = int(recipe.max_duration.removesuffix('ba')) * recipe.global_train_batch_size * recipe.max_seq_len
    arguments = ['--out', str(data), '--seq-len', str(recipe.max_seq_len), '--budget-tokens', str(tokens)]
    arguments += ['--validation-tokens', str(VALIDATION_TOKENS)]
    arguments += ['--source', str(source)] if source else []
    arguments += ['--tokenizer', tokenizer] if tokenizer else []
    if subprocess.run([sys.executable, '-m', 'data_prep', *arguments]).returncode:
        sys.exit(1)


class TimeLeft:
    """Estimates the time left for all trainings, from the time per FLOP and the time outside the batches so far."""

    def __init__(self, data: Path):
        decoders = {
            run_file: Decoder.from_model_config(
                resolve_model(REPOSITORY / 'yamls' / f'{run_file}.yaml', [f'variables.data={data}'])[0]
            )
            for run_file in RUN_FILES.values()
        }
        self.flops = {run_file: float(exact_flops(decoder, 256).total) for run_file, decoder in decoders.items()}
        self.seconds, self.done = 0.0, 0.0
        """Seconds of batches so far, and their FLOPs (per sequence, times the fraction trained)."""
        self.outside: list[float] = []
        """Seconds of each run before its first batch and after its last: imports, the last evaluation, shutdown."""

    def start(self, run_file: str, now: float) -> None:
        """Take note that a run starts."""
        self.run_file, self.fraction, self.last, self.training = run_file, 0.0, now, False

    def reached(self, fraction: float, now: float) -> None:
        """Take note that ``fraction`` of the batches is trained. Only a larger fraction than before counts."""
        if not self.training:
            self.outside.append(now - self.last)
            self.training, self.last = True, now
        elif fraction > self.fraction:
            self.seconds += now - self.last
            self.done += self.flops[self.run_file] * (fraction - self.fraction)
            self.fraction, self.last = fraction, now

    def end(self, now: float) -> None:
        """Take note that the run has ended."""
        if self.training:
            self.outside[-1] += now - self.last

    def text(self) -> str:
        """Return the time left."""
        if not self.done:
            return 'estimating the time left'
        names = list(self.flops)
        later = names[names.index(self.run_file) + 1 :]
        flops = self.flops[self.run_file] * (1 - self.fraction) + sum(self.flops[name] for name in later)
        starts = len(later) + (not self.training)
        seconds = flops * self.seconds / self.done + starts * sum(self.outside) / len(self.outside)
        return f'about {max(1, round(seconds / 60))} min left'


def train(name: str, run_file: str, data: Path, out: Path, left: TimeLeft) -> None:
    """Run ``composer train.py yamls/<run_file>.yaml`` with a progress bar; its output goes to a file."""
    log, composer = out / f'{run_file}.log', Path(sys.executable).with_name('composer')
    places = [f'variables.data={data.resolve()}', f'variables.runs={(out / "runs").resolve()}']
    command = [str(composer), '-n', '1', 'train.py', f'yamls/{run_file}.yaml', *places]
    console.print(f'composer -n 1 train.py yamls/{run_file}.yaml {" ".join(places)} > {log}')
    columns = (TextColumn('{task.description}'), BarColumn(bar_width=20), TimeElapsedColumn())
    left.start(run_file, time.monotonic())
    with open(log, 'w') as sink, Progress(*columns, console=console) as progress:
        bar = progress.add_task(f'{name}: starting, {left.text()}', total=None)
        environment = {**KEEP_BUFFERS, **os.environ}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            printed = log.read_text()
            if not (batches := BATCH.findall(printed)):
                continue
            batch, total = map(int, batches[-1])
            left.reached(batch / total, time.monotonic())
            losses = LOSS.findall(printed)
            loss = f', loss {float(losses[-1]):.3f}' if losses else ''
            progress.update(
                bar, completed=batch, total=total, description=f'{name}: batch {batch}/{total}{loss}, {left.text()}'
            )
    left.end(time.monotonic())
    if process.returncode:
        console.print(''.join(log.read_text().splitlines(keepends=True)[-15:]), markup=False)
        sys.exit(f'quickstart: training {run_file} failed; its output is in {log}')


def summary(results: list[Result]) -> Table:
    """Return the table for the terminal."""
    rows = [result.row() for result in results]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return table
