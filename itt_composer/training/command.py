"""``itt train``, and ``train.py`` for the ``composer`` launcher: from the command line to a training."""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import replace
from typing import Annotated, NoReturn

import typer
from omegaconf import DictConfig, OmegaConf

from itt_composer.config.run_file import resolve
from itt_composer.training.build_error import build_error
from itt_composer.training.preflight import Machine, problems
from itt_composer.training.run_error import RunError

RUN = typer.Argument(metavar='CONFIG', help='Name that `itt ls` lists, or a YAML file.', show_default=False)
OVERRIDES = typer.Argument(
    metavar='[key=value ...]', help='Keys to set: parts.machine=cpu optimizer.lr=1e-3 ...', show_default=False
)
# What --verbose sets, where the command line says nothing else.
VERBOSE = ('log_config=true', 'log_to_console=true', 'python_log_level=info')


def train(
    run: Annotated[str, RUN],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    nproc: Annotated[
        int, typer.Option('--nproc', '-n', min=1, help='Processes on this machine, one for each GPU.')
    ] = 1,
    print_config: Annotated[bool, typer.Option('--print-config', help='Print the resolved config and stop.')] = False,
    verbose: Annotated[bool, typer.Option('--verbose', help="Show Composer's and foundry's own output.")] = False,
) -> None:
    """Train a model. The same command again continues the run from its last checkpoint.

    Several machines: composer -n 8 --world_size 16 --node_rank ... -m itt_composer train CONFIG
    """
    overrides = [*(VERBOSE if verbose else ()), *(overrides or [])]
    config, machine = checked(run, overrides, nproc, check_machine=not print_config)
    if print_config:
        print(OmegaConf.to_yaml(config), end='')
    elif nproc > 1:
        options = ['--verbose'] if verbose else []
        launcher = [sys.executable, '-m', 'itt_composer.training.launcher', '-n', str(nproc), '-m', 'itt_composer']
        say(f'starting {nproc} processes', machine)
        os.execv(sys.executable, [*launcher, 'train', run, *overrides, *options])
    else:
        say('loading Composer and LLM-Foundry (10 to 30 s)', machine)
        if not verbose:
            warnings.simplefilter('ignore')
        from itt_composer.training.run import train as train_run

        try:
            train_run(config)
        except RunError as error:
            stop(str(error), machine, exit_code=error.exit_code)
        except Exception as error:
            problem = None if verbose else build_error(error)
            if problem is None:
                raise
            stop(f'{run}: {problem}', machine)


def checked(
    run: str, overrides: list[str], nproc: int = 1, check_machine: bool = True, program: str = 'train'
) -> tuple[DictConfig, Machine]:
    """The resolved config, and the machine it can run on; ends the process with one line where there is none.

    Args:
        run: name or path of a training config.
        overrides: ``key=value``.
        nproc: processes that are about to start here; 1 for those that a launcher has started.
        check_machine: whether the config has to run on this machine.
        program: what the line starts with.
    """
    machine = Machine.here()
    try:
        config = resolve(run, overrides)
    except ValueError as error:
        stop(str(error), machine, program)
    if nproc > 1:
        if machine.world_size > 1:
            stop(f'-n: expected none under a launcher, got {nproc}; leave it out', machine, program)
        machine = replace(machine, world_size=nproc, local_world_size=nproc)
    if check_machine and (found := problems(config, machine)):
        stop(f'{run}: {"; ".join(found)}', machine, program)
    return config, machine


def say(message: str, machine: Machine) -> None:
    """Print what goes on, once on each machine."""
    if machine.local_rank == 0:
        print(message, flush=True)


def stop(message: str, machine: Machine, program: str = 'train', exit_code: int = 1) -> NoReturn:
    """End the process with one line; where all processes of a machine fail, the first one prints it."""
    if machine.local_rank:
        # The launcher ends all processes when the first one exits; one that fails alone goes on to print its error.
        time.sleep(5)
    if exit_code == 1:
        sys.exit(f'{program}: {message}')
    print(f'{program}: {message}', file=sys.stderr)
    sys.exit(exit_code)
