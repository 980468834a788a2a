"""``itt eval-data``: evaluation files in foundry's form into a folder for offline tasks.

Foundry's files hold prompts, lm-eval's data sets the fields that prompts are made of. Here the prompts are taken apart
again, so that lm-eval's own definitions make them anew.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from itt_composer.atomic import atomic_folder
from itt_composer.checks import json_lines
from itt_composer.one_line import one_line_errors

Document = dict[str, Any]
Conversion = Callable[[Document], Document]


def _expects(form: str) -> Callable[[Conversion], Conversion]:
    """Have a conversion name the form of its rows, whatever it meets in another one."""

    def named(conversion: Conversion) -> Conversion:
        @wraps(conversion)
        def convert_row(row: Document) -> Document:
            try:
                return conversion(row)
            except (AttributeError, LookupError, TypeError, ValueError):
                raise ValueError(f"expected {form}, got {row!s:.100}; use LLM-Foundry's file") from None

        return convert_row

    return named


@_expects('"Question: ..." with choices and gold (a number)')
def arc(row: Document) -> Document:
    """``Question: <question>``, four or so choices."""
    labels = list(string.ascii_uppercase[: len(row['choices'])])
    return {
        'question': _between(row['query'], 'Question: '),
        'choices': {'text': row['choices'], 'label': labels},
        'answerKey': labels[row['gold']],
    }


@_expects('"Question: ..." with two choices and gold (a number)')
def piqa(row: Document) -> Document:
    """``Question: <goal>``, two solutions."""
    first, second = row['choices']
    return {'goal': _between(row['query'], 'Question: ', '\n'), 'sol1': first, 'sol2': second, 'label': row['gold']}


@_expects('"Passage: ... Question: ...?" with the choices no and yes, and gold (a number)')
def boolq(row: Document) -> Document:
    """``Passage: <passage>``, ``Question: <question>?``; no and yes."""
    passage, question = row['query'].rsplit('\nQuestion: ', 1)
    if row['choices'] != ['no', 'yes']:
        raise ValueError
    return {'passage': _between(passage, 'Passage: '), 'question': _between(question, '', '?'), 'label': row['gold']}


@_expects('"Context: ... Question: ... Choices: A. ... D." with gold (a number)')
def logiqa(row: Document) -> Document:
    """``Context:``, ``Question:``, ``Choices: A. ...``; foundry scores the letters, lm-eval the answers' texts."""
    match = re.fullmatch(
        r'Context: (.*)\nQuestion: (.*)\nChoices: A\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\n', row['query'], re.S
    )
    if match is None:
        raise ValueError
    context, question, *options = match.groups()
    return {'context': context, 'question': question, 'options': options, 'label': 'abcd'[row['gold']]}


@_expects('two context_options with continuation and gold (a number)')
def winogrande(row: Document) -> Document:
    """Two beginnings that differ in their last words, one end."""
    one, two = row['context_options']
    # Up to the last space that both share: an option is whole words.
    start = os.path.commonprefix([one, two]).rfind(' ') + 1  # noqa: RUF071 (strings, not paths)
    return {
        'sentence': f'{one[:start]}_ {row["continuation"]}',
        'option1': one[start:],
        'option2': two[start:],
        'answer': str(row['gold'] + 1),
    }


@_expects('context with a continuation of one word')
def lambada(row: Document) -> Document:
    """A text and its last word."""
    if ' ' in row['continuation']:
        raise ValueError
    return {'text': f'{row["context"]} {row["continuation"]}'}


SOURCES: dict[str, tuple[str, Conversion]] = {
    'arc_easy.jsonl': ('arc_easy', arc),
    'arc_challenge.jsonl': ('arc_challenge', arc),
    'piqa.jsonl': ('piqa', piqa),
    'boolq.jsonl': ('boolq', boolq),
    'logi_qa.jsonl': ('logiqa', logiqa),
    'winogrande.jsonl': ('winogrande', winogrande),
    'lambada_openai.jsonl': ('lambada_openai', lambada),
}


def convert(source: Path, out: Path) -> dict[str, int]:
    """Convert every file of ``source`` that is known, and write the task files of both harnesses.

    Returns:
        Task to number of documents.

    Raises:
        ValueError: no known file in ``source``, or a row that is not what its file's name says.
    """
    files = {name: task for name, task in SOURCES.items() if (source / name).is_file()}
    if not files:
        raise ValueError(f'{source}: expected one of {", ".join(SOURCES)}, got none; pass the folder of the task files')
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the source is in it, and the complete folder would be replaced; name another')
    from itt_composer.evaluation.foundry_files import FOUNDRY_FILES
    from itt_composer.evaluation.local_tasks import TASK_FILES

    written = {*(f'{task}/test.jsonl' for task, _ in SOURCES.values())}

    def own(there: Path) -> bool:
        files = (file.relative_to(there) for file in there.rglob('*') if not file.is_dir())
        return all(file.parts[0] in (TASK_FILES, FOUNDRY_FILES) or file.as_posix() in written for file in files)

    counts = {}
    with atomic_folder(out, own) as folder:
        for name, (task, conversion) in files.items():
            documents = [document for _, document in json_lines(source / name, conversion)]
            (folder / task).mkdir()
            lines = (json.dumps(item, ensure_ascii=False) + '\n' for item in documents)
            (folder / task / 'test.jsonl').write_text(''.join(lines), encoding='utf-8')
            counts[task] = len(documents)
    write_definitions(out)
    return counts


def write_definitions(data: Path) -> list[str]:
    """Write the task files of lm-eval and of foundry for the documents in ``data``; returns the tasks."""
    from itt_composer.evaluation.foundry_files import write_foundry_files
    from itt_composer.evaluation.local_tasks import write_task_files

    present = write_task_files(data)
    write_foundry_files(data, present)
    return [task.name for task in present]


def _between(text: str, prefix: str, suffix: str = '') -> str:
    if not (text.startswith(prefix) and text.endswith(suffix)):
        raise ValueError
    return text.removeprefix(prefix).removesuffix(suffix)


def main(
    source: Annotated[
        Path | None,
        typer.Option(
            help="Folder with LLM-Foundry's task files (arc_easy.jsonl, ...). Without --source: OUT already has "
            '<task>/test.jsonl, and only the task files are written.'
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help='Output folder. With --source, its content is replaced.')] = Path(
        'eval_data'
    ),
) -> None:
    """Write the documents, and the task files of lm-eval and foundry for them."""
    with one_line_errors('eval-data'):
        done = (
            [f'{task:16} {count:6} documents' for task, count in convert(source, out).items()]
            if source
            else write_definitions(out)
        )
    for line in [*done, f'itt eval --eval-data {out}, or itt-lm-eval --include_path {out}/lm_eval']:
        Console(soft_wrap=True).print(line, highlight=False)
