"""Evaluate a trained model on foundry's in-context-learning tasks.

composer eval.py yamls/eval/gauntlet.yaml run=yamls/itt_x4_230m.yaml [key=value ...]
python eval.py yamls/eval/gauntlet.yaml --print-config
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from omegaconf import DictConfig, OmegaConf

from itt_composer.evaluation.eval_file import resolve_evaluation
from itt_composer.training.command import stop
from itt_composer.training.fsdp import choose_fsdp
from itt_composer.training.preflight import Machine, problems


def main(arguments: list[str] | None = None) -> None:
    """Resolve the evaluation file, see that this machine can run it, hand it to foundry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('eval_file', help='for example yamls/eval/gauntlet.yaml')
    parser.add_argument(
        'overrides', nargs='*', metavar='key=value', help='run=yamls/llama_162m.yaml, load_path=..., ...'
    )
    parser.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
    options = parser.parse_intermixed_args(arguments)
    try:
        run, config = resolve_evaluation(options.eval_file, options.overrides)
    except ValueError as error:
        stop(str(error), Machine.here(), 'eval.py')
    if options.print_config:
        print(OmegaConf.to_yaml(config), end='')
        return
    machine = Machine.here()
    found = problems(run, machine)
    if found:
        stop(f'{options.eval_file}: {"; ".join(found)}', machine, 'eval.py')
    evaluate(config)


def evaluate(config: DictConfig) -> None:
    """Score, and print foundry's tables."""
    from llmfoundry.command_utils import evaluate as foundry_evaluate

    choose_fsdp(config)

    for task in config.icl_tasks:
        task.dataset_uri = str(Path(task.dataset_uri).resolve()) if '://' not in task.dataset_uri else task.dataset_uri
    for model in config.models:
        if Path(model.tokenizer.name).is_dir():
            model.tokenizer.name = str(Path(model.tokenizer.name).resolve())
    here = os.getcwd()
    # Foundry copies the tasks' files into the current folder, and two evaluations would write the same ones.
    with node_folder() as scratch:
        os.chdir(scratch)
        try:
            foundry_evaluate(config)
        finally:
            os.chdir(here)


@contextmanager
def node_folder() -> Iterator[Path]:
    """One empty folder for all processes of a launcher: the first one copies the files, the others wait for them."""
    launcher = psutil.Process().parent()
    if Machine.here().local_world_size == 1 or launcher is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    shared = Path(tempfile.gettempdir()) / f'itt_eval-{launcher.pid}-{launcher.create_time():.2f}'
    shared.mkdir(exist_ok=True)
    try:
        yield shared
    finally:
        if Machine.here().local_rank == 0:
            shutil.rmtree(shared, ignore_errors=True)


if __name__ == '__main__':
    main()
