"""Train the model of a run file.

composer train.py yamls/itt_x4_230m.yaml [key=value ...]
python train.py yamls/itt_x4_230m.yaml --print-config
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NoReturn

from omegaconf import OmegaConf

from itt_composer.config.run_file import resolve
from itt_composer.training.preflight import Machine, problems
from itt_composer.training.run import train
from itt_composer.training.run_error import RunError


def main(arguments: list[str] | None = None) -> None:
    """Resolve the run file, see that this machine can run it, hand it to foundry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run_file', help='for example yamls/itt_x4_162m.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='parts.machine=cpu, optimizer.lr=1e-3, ...')
    parser.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(options.run_file, options.overrides)
    except ValueError as error:
        stop(str(error), Machine.here())
    if options.print_config:
        print(OmegaConf.to_yaml(config), end='')
        return
    machine = Machine.here()
    found = problems(config, machine)
    if found:
        stop(f'{options.run_file}: {"; ".join(found)}', machine)
    try:
        train(config)
    except RunError as error:
        stop(str(error), machine, exit_code=error.exit_code)


def stop(message: str, machine: Machine, program: str = 'train.py', exit_code: int = 1) -> NoReturn:
    """Say it once a node, in one line, and exit."""
    if machine.local_rank:
        # The launcher ends every process when the first one exits, so the one that has the word goes first.
        time.sleep(5)
        sys.exit(exit_code)
    if exit_code == 1:
        sys.exit(f'{program}: {message}')
    print(f'{program}: {message}', file=sys.stderr)
    sys.exit(exit_code)


if __name__ == '__main__':
    main()
