"""``itt``: every command of the library. The module of a command is imported when it is called or described."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import itt_composer
from itt_composer.config.files import names, yamls_folder
from itt_composer.config.run_file import resolve_model
from itt_composer.flops import Decoder, report
from itt_composer.one_line import one_line_errors
from itt_composer.training.command import OVERRIDES, RUN, checked

# Command to its function. None of these modules imports torch, so that a mistake is reported immediately.
COMMANDS = {
    'ls': 'itt_composer.cli:ls',
    'validate': 'itt_composer.cli:validate',
    'flops': 'itt_composer.cli:flops',
    'data': 'data_prep.__main__:main',
    'verify-data': 'data_prep.verify:main',
    'train': 'itt_composer.training.command:train',
    'export': 'itt_composer.export.command:main',
    'eval-data': 'itt_composer.evaluation.convert:main',
    'eval': 'itt_composer.evaluation.commands:evaluate',
    'calibrate': 'itt_composer.evaluation.commands:calibrate',
    'sweep': 'itt_composer.evaluation.commands:sweep',
    'tokens': 'itt_composer.evaluation.commands:tokens',
}
# Started again, these continue where they were.
CONTINUES = ('train', 'data')


class Commands(TyperGroup):
    """The commands of :data:`COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command, with the options and the help that its function's signature has; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].split(':')
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        own.command(cmd_name)(getattr(import_module(module), function))
        return get_command(own)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Expand ``~``, which a shell leaves alone behind ``=`` and in quotes."""
        home = str(Path.home())
        return super().parse_args(ctx, [re.sub(r'(^|=)~(?=/|$)', lambda m: m[1] + home, text) for text in args])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C ends it with one line and exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            continues = ctx.invoked_subcommand in CONTINUES
            print('\nstopped; the same command continues' if continues else '\nstopped', file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(itt_composer.__version__)
        raise typer.Exit


@app.callback()
def _itt(
    version: Annotated[
        bool, typer.Option('--version', help='Print the version and stop.', callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Inner Thinking Transformer (arXiv 2502.13842) for MosaicML Composer and LLM-Foundry."""


def ls() -> None:
    """List the training configs, config groups, studies and evaluation files that come with the package."""
    groups = sorted(folder.name for folder in (yamls_folder() / 'parts').iterdir())
    sections = {
        'training configs (itt train CONFIG)': [*names(), *(f'sft/{name}' for name in names('sft'))],
        **{f'config group parts.{group}': names(f'parts/{group}') for group in groups},
        'studies (python -m research study STUDY, in a checkout)': names('studies'),
        'evaluation files (composer eval.py FILE, in a checkout)': names('eval'),
    }
    for title, found in sections.items():
        print(f'{title}:\n  {" ".join(found)}')
    print(f'all in {yamls_folder()}')


def validate(run: Annotated[str, RUN], overrides: Annotated[list[str] | None, OVERRIDES] = None) -> None:
    """Check a training config, its data and this machine, as `itt train` does before it starts."""
    config, _ = checked(run, overrides or [], program='validate')
    print(f'{config.run_name}: valid; it trains for {config.max_duration} on {config.variables.data}')


def flops(run: Annotated[str, RUN], overrides: Annotated[list[str] | None, OVERRIDES] = None) -> None:
    """Print parameters and FLOPs of a model, the paper's count and the exact one, as one JSON object."""
    with one_line_errors('flops'):
        model, sequence_length = resolve_model(run, overrides or [])
        decoder = Decoder.from_model_config(model)
    print(json.dumps(report(decoder, sequence_length), indent=2))
