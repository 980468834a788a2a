"""``python -m research study STUDY [key=value ...]``: train the missing runs of a study, then write its report."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from omegaconf import DictConfig
from rich.console import Console

from itt_composer.atomic import write_text
from itt_composer.config.run_file import resolve_model
from itt_composer.flops import Decoder
from itt_composer.one_line import one_line_errors
from itt_composer.training.preflight import Machine, problems
from itt_composer.training.run_lock import only_process
from research.scale import GPUS, gpu_hours
from research.study.folder import StudyFolder
from research.study.report import write_report
from research.study.results import ANSWERS, ELASTIC, best_settings, final, training_batches
from research.study.settings import dotlist
from research.study.stored import StoredResults
from research.study.study_file import Run, Study, load_study

# Standard output has only the commands for a cluster.
console = Console(stderr=True, soft_wrap=True, highlight=False)


def main(
    study_file: Annotated[Path, typer.Argument(metavar='STUDY', help='yamls/studies/headline.yaml, ...')],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar='key=value', help='seeds=[17], where.concurrent=1, set.optimizer.lr=1e-3'),
    ] = None,
    out: Annotated[Path | None, typer.Option(help='Folder of the study; runs/studies/<name> by default.')] = None,
    stored: Annotated[
        list[Path] | None,
        typer.Option(help='Folder with results.csv and manifest.json; its runs are not trained again. Repeatable.'),
    ] = None,
) -> None:
    """Train the runs without results, several concurrently. After a stop the same command continues."""
    try:
        with one_line_errors('study'):
            study = load_study(study_file, overrides or [])
            results = tuple(StoredResults.read(path) for path in stored or ())
            folder = StudyFolder(study, out or Path('runs') / 'studies' / study.name, results)
            folder.path.mkdir(parents=True, exist_ok=True)
            with only_process(folder.path, 'set another folder (--out)'):
                complete = carry_out(study, folder)
    except KeyboardInterrupt:
        raise SystemExit('study: stopped; the same command continues') from None
    if not complete:
        raise SystemExit(1)


def carry_out(study: Study, folder: StudyFolder) -> bool:
    """Run the sweep, the main runs, the elastic settings and the report; returns whether all runs have results."""
    check_elastic(study)
    complete = run_stage(study, folder, study.tuning_runs(folder.runs))
    best = best_settings(folder.table(), study.tuning) if study.tuning and folder.done else {}
    if study.tuning:
        for variant in study.variants:
            console.print(
                f'# {variant}: {best.get(variant, "its main runs wait for a complete sweep with a finite loss")}'
            )
    complete &= run_stage(study, folder, study.main_runs(folder.runs, best))
    if folder.done:
        folder.write()
        folder.carry_over(ANSWERS)
        if study.elastic:
            complete &= elastic(study, folder)
        console.print(f'the report: {write_report(study, folder.path, folder.path)}')
    return complete


def run_stage(study: Study, folder: StudyFolder, runs: list[Run]) -> bool:
    """Train the runs that have no results; returns whether all have them now."""
    open_runs = folder.add(runs)
    if len(open_runs) < len(runs):
        console.print(f'{len(runs) - len(open_runs)} of {len(runs)} runs are done')
    if not open_runs:
        return True
    if study.where.place == 'commands':
        return print_commands(study, folder, open_runs)
    machine = Machine.here()
    for run in open_runs:
        if found := problems(folder.configs[run.name], machine):
            raise ValueError(f'{run.name}: {"; ".join(found)}')
    devices = _gpus(machine) if study.where.place == 'gpu' else None
    concurrent = study.where.concurrent or (len(devices) if devices else len(os.sched_getaffinity(0)))
    if devices is not None:  # More runs than GPUs share them evenly.
        devices = list(itertools.islice(itertools.cycle(devices), concurrent))

    console.print(f'to train: {", ".join(run.name for run in open_runs)}')
    from research.study.processes import run_all

    failed = run_all(
        [(run.name, folder.configs[run.name]) for run in open_runs],
        folder.finish,
        folder.path / 'logs',
        concurrent,
        devices,
        console,
    )
    if failed:
        console.print(f'[red]failed[/red]: {", ".join(failed)}; the same command tries them again')
    return not failed


def print_commands(study: Study, folder: StudyFolder, runs: list[Run]) -> bool:
    """Print the commands of the runs without results, for a cluster; returns whether there are none."""
    waiting = []
    for run in runs:
        try:
            folder.finish(run.name)
        except ValueError:
            waiting.append(run)
    for run in waiting:
        command = [*shlex.split(study.where.launcher), os.path.relpath(run.run_file), *run.overrides]
        print(shlex.join(command))
    if waiting:
        console.print(
            f'# {len(waiting)} runs to train; run this command again where {folder.runs} is mounted to collect them'
        )
        console.print(f'# {predicted_cost([folder.configs[run.name] for run in waiting])}')
    return not waiting


def predicted_cost(configs: list[DictConfig]) -> str:
    """Predict the GPU hours of the trainings on 8 A100 or H100, as ``python -m research scale`` does."""
    hours = dict.fromkeys(GPUS, 0.0)
    try:
        for config in configs:
            decoder, S = Decoder.from_model_config(config.model), config.max_seq_len
            batch, batches = config.global_train_batch_size, training_batches(config)
            for name, gpu in GPUS.items():
                hours[name] += gpu_hours(decoder, S, batch, batches, math.gcd(batch, 8), gpu)
    except ValueError as error:
        return f'no prediction of their cost: {error}'
    each = ', '.join(f'{hours[name]:,.0f} on {gpu.name}' for name, gpu in GPUS.items())
    return f'predicted GPU hours without evaluations: {each} (python -m research scale)'


def check_elastic(study: Study) -> None:
    """Check that the variants with other token ratios at test time route tokens.

    Raises:
        ValueError: one of them routes no tokens.
    """
    for variant in study.elastic:
        model, _ = resolve_model(study.run_files[variant], dotlist(study.sets[variant]))
        if model.get('thinking') != 'itt' or not model.get('token_routing', True):
            raise ValueError(f'elastic.{variant}: its models route no tokens; set elastic.{variant}=null')


def elastic(study: Study, folder: StudyFolder) -> bool:
    """Evaluate the variants of ``elastic`` with other token ratios (Table 2), from an export of each checkpoint."""
    tables, complete = [], True
    for run in folder.known.values():
        rows = study.elastic.get(run.variant)
        if run.stage != 'main' or rows is None or run.name not in folder.done:
            continue
        if final(folder.done[run.name]).loss_threshold.isna().any():
            continue  # It diverged.
        of = {'study': study.name, 'run': run.name, 'variant': run.variant, 'seed': run.seed, 'sequences': rows}
        if run.name in folder.elsewhere:
            stored, there = folder.elsewhere[run.name]
            known = stored.more_rows(ELASTIC, there)
            if known.empty or set(known.sequences) != {rows}:
                console.print(f'{run.name}: {stored.path} has no {ELASTIC} of it on {rows} sequences')
                complete = False
            else:
                tables.append(known.assign(**of))
            continue
        # Another number of sequences is another measurement.
        target, exported = folder.runs / run.name / f'elastic_{rows}', folder.runs / run.name / 'exported'
        if not target.with_suffix('.csv').is_file():
            data, checkpoint = folder.configs[run.name].variables.data, str(folder.checkpoints(run.name))
            log = folder.path / 'logs' / f'{run.name}.elastic.log'
            if not (
                _module(log, 'export', '--checkpoint', checkpoint, '--out', str(exported), '--overwrite')
                and _module(log, 'sweep', str(exported), '--data', data, '--sequences', str(rows), '--out', str(target))
            ):
                complete = False
                continue
        tables.append(pd.read_csv(target.with_suffix('.csv')).assign(**of))
    if tables:
        write_text(pd.concat(tables).to_csv(index=False, float_format='%.7g'), folder.path / ELASTIC)
    return complete


def _module(log: Path, name: str, *arguments: str) -> bool:
    console.print(f'{name} {" ".join(arguments)}')
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as sink:
        code = subprocess.run(
            [sys.executable, '-m', 'itt_composer', name, *arguments], stdout=sink, stderr=subprocess.STDOUT
        ).returncode
    if code:
        console.print(f'[red]{name} failed[/red]; its output is in {log}')
    return code == 0


def _gpus(machine: Machine) -> list[str]:
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return visible.split(',') if visible else [str(i) for i in range(machine.gpus)]
