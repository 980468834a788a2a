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
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from itt_composer.atomic import atomic_folder
from itt_composer.checks import json_lines
from itt_composer.one_line import one_line_errors

Document = dict[str, Any]


def arc(row: Document) -> Document:
    """``Question: <question>``, four or so choices."""
    labels = list(string.ascii_uppercase[: len(row['choices'])])
    return {
        'question': _between(row['query'], 'Question: '),
        'choices': {'text': row['choices'], 'label': labels},
        'answerKey': labels[row['gold']],
    }


def piqa(row: Document) -> Document:
    """``Question: <goal>``, two solutions."""
    first, second = row['choices']
    return {'goal': _between(row['query'], 'Question: ', '\n'), 'sol1': first, 'sol2': second, 'label': row['gold']}


def boolq(row: Document) -> Document:
    """``Passage: <passage>``, ``Question: <question>?``; no and yes."""
    passage, question = row['query'].rsplit('\nQuestion: ', 1)
    if row['choices'] != ['no', 'yes']:
        raise ValueError
    return {'passage': _between(passage, 'Passage: '), 'question': _between(question, '', '?'), 'label': row['gold']}


def logiqa(row: Document) -> Document:
    """``Context:``, ``Question:``, ``Choices: A. ...``; foundry scores the letters, lm-eval the answers' texts."""
    match = re.fullmatch(
        r'Context: (.*)\nQuestion: (.*)\nChoices: A\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\n', row['query'], re.S
    )
    if match is None:
        raise ValueError
    context, question, *options = match.groups()
    return {'context': context, 'question': question, 'options': options, 'label': 'abcd'[row['gold']]}


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


def lambada(row: Document) -> Document:
    """A text and its last word."""
    if ' ' in row['continuation']:
        raise ValueError
    return {'text': f'{row["context"]} {row["continuation"]}'}


class Source(NamedTuple):
    """A task file of LLM-Foundry."""

    task: str
    convert: Callable[[Document], Document]
    form: str
    """What a row is like, for the message about one that is not."""

    def documents(self, file: Path) -> list[Document]:
        """The rows of ``file``, converted; a ValueError names the first one of another form."""

        def document(row: Document) -> Document:
            try:
                return self.convert(row)
            except (AttributeError, LookupError, TypeError, ValueError):
                raise ValueError(f"expected {self.form}, got {row!s:.100}; use LLM-Foundry's file") from None

        return [converted for _, converted in json_lines(file, document)]


SOURCES = {
    'arc_easy.jsonl': Source('arc_easy', arc, '"Question: ..." with choices and gold (a number)'),
    'arc_challenge.jsonl': Source('arc_challenge', arc, '"Question: ..." with choices and gold (a number)'),
    'piqa.jsonl': Source('piqa', piqa, '"Question: ..." with two choices and gold (a number)'),
    'boolq.jsonl': Source(
        'boolq', boolq, '"Passage: ... Question: ...?" with the choices no and yes, and gold (a number)'
    ),
    'logi_qa.jsonl': Source('logiqa', logiqa, '"Context: ... Question: ... Choices: A. ... D." with gold (a number)'),
    'winogrande.jsonl': Source('winogrande', winogrande, 'two context_options with continuation and gold (a number)'),
    'lambada_openai.jsonl': Source('lambada_openai', lambada, 'context with a continuation of one word'),
}


def convert(source: Path, out: Path) -> dict[str, int]:
    """Convert every file of ``source`` that is known, and write the task files of both harnesses.

    Returns:
        Task to number of documents.

    Raises:
        ValueError: no known file in ``source``, or a row that is not what its file's name says.
    """
    files = {name: known for name, known in SOURCES.items() if (source / name).is_file()}
    if not files:
        raise ValueError(f'{source}: expected one of {", ".join(SOURCES)}, got none; pass the folder of the task files')
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the source is in it, and the complete folder would be replaced; name another')
    from itt_composer.evaluation.foundry_files import FOUNDRY_FILES
    from itt_composer.evaluation.local_tasks import TASK_FILES

    written = {f'{known.task}/test.jsonl' for known in SOURCES.values()}

    def own(there: Path) -> bool:
        files = (file.relative_to(there) for file in there.rglob('*') if not file.is_dir())
        return all(file.parts[0] in (TASK_FILES, FOUNDRY_FILES) or file.as_posix() in written for file in files)

    counts = {}
    with atomic_folder(out, own) as folder:
        for name, known in files.items():
            documents = known.documents(source / name)
            (folder / known.task).mkdir()
            lines = (json.dumps(item, ensure_ascii=False) + '\n' for item in documents)
            (folder / known.task / 'test.jsonl').write_text(''.join(lines), encoding='utf-8')
            counts[known.task] = len(documents)
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
    out: Annotated[Path, typer.Option(help='Output folder. With --source, an earlier output is replaced.')] = Path(
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
