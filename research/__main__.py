"""``python -m research VERB``: the commands of the studies and figures."""

from __future__ import annotations

from importlib import import_module

import typer

VERBS = {
    'study': ('research.study.command', 'Train the missing runs of a study, then write its report.'),
    'report': ('research.study.report', "Write a study's report again from its stored tables."),
    'figures': ('research.figures.command', "Draw the paper's figures, from models or from stored tables."),
    'quickstart': ('research.quickstart.command', 'Make data, train three tiny models, write a page about them.'),
    'scale': ('research.scale', 'Predict speed, days and cost of trainings on several GPUs.'),
    'corpus': ('research.corpus.command', 'Make a few hundred MB of plain text from Debian packages.'),
    'k-hop data': ('research.k_hop.data', 'Write the text of the k-hop task and its tokenizer.'),
    'k-hop answers': ('research.k_hop.answers', 'Measure the loss of each kind of token of the k-hop task.'),
    'state-tracking run': ('research.state_tracking.command', 'Train the missing runs of the state-tracking study.'),
    'state-tracking report': ('research.state_tracking.report', 'Write the tables and figures of that study.'),
}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
GROUPS = {
    'k-hop': 'The k-hop task, a synthetic text in which more layers help.',
    'state-tracking': 'A task with a label at every position, in which more layers help.',
}
groups = {name: typer.Typer(no_args_is_help=True, help=text) for name, text in GROUPS.items()}
for _name, _group in groups.items():
    app.add_typer(_group, name=_name)


def _add(verb: str, module: str, help_text: str) -> None:
    """Forward a verb's arguments to the ``main`` of its module, which has the options and their help."""
    group, _, name = verb.rpartition(' ')
    parent = groups.get(group, app)
    settings = {'ignore_unknown_options': True, 'allow_extra_args': True}

    @parent.command(name, help=help_text, context_settings=settings, add_help_option=False)
    def forward(context: typer.Context) -> None:
        own = typer.Typer(add_completion=False)
        own.command()(import_module(module).main)
        own(args=context.args, prog_name=f'python -m research {verb}')


for _verb, _target in VERBS.items():
    _add(_verb, *_target)

if __name__ == '__main__':
    app()
