"""Questions and answers as the examples that foundry's ``finetuning`` loader takes, and the check of a file of them.

``preprocessing_fn: itt_composer.config.examples:plain`` (or ``:chat``) in a training config makes an example of a line
of JSONL with the fields ``question`` and ``answer``. The loss is that of the answer. The prompt is the one that lm-eval
asks GSM8K with, so that evaluation shows the model what it was trained on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from itt_composer.checks import json_lines
from itt_composer.data_folder import read_tokenizer

Example = Mapping[str, Any]
_BATCH = 512


def plain(row: Mapping[str, Any]) -> dict[str, str]:
    """The prompt ``Question: <question>\\nAnswer:``, and the answer after a blank."""
    question, answer = _fields(row)
    return {'prompt': _prompt(question), 'response': f' {answer}'}


def chat(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The same prompt and answer as a user's and an assistant's message, for the tokenizer's chat template."""
    question, answer = _fields(row)
    return {'messages': [{'role': 'user', 'content': _prompt(question)}, {'role': 'assistant', 'content': answer}]}


def _prompt(question: str) -> str:
    return f'Question: {question}\nAnswer:'


def _fields(row: Mapping[str, Any]) -> tuple[str, str]:
    return _text(row, 'question'), _text(row, 'answer')


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f'no field {key!r}, only {", ".join(map(repr, row)) or "none"}')
    if not isinstance(value := row[key], str) or not value.strip():
        raise ValueError(f'{key}: expected a text that is not empty, got {value!r}')
    value.encode()  # JSON can have half of a surrogate pair, which tokenizers do not take.
    return value


def check_examples(
    file: Path,
    preprocessing_fn: str | Mapping[str, str] | None,
    max_seq_len: int | None = None,
    tokenizer: Path | None = None,
) -> int:
    """Check every line of a file of examples before a training, which would drop or cut some without naming them.

    Args:
        file: JSONL.
        preprocessing_fn: as foundry takes it: ``module:function`` of a line, or which fields are prompt and response.
        max_seq_len: the most tokens that an example may have; None: lengths are not checked.
        tokenizer: folder with a ``tokenizer.json``; None: lengths are not checked.

    Returns:
        The number of examples.

    Raises:
        ValueError: one line with the file and the number of the first bad line in it.
    """
    found = list(examples(file, preprocessing_fn))
    if not found:
        raise ValueError(f'{file}: no examples in it')
    if max_seq_len is None or tokenizer is None:
        return len(found)
    lengths = _lengths([example for _, example in found], tokenizer)
    too_long = [(number, length) for (number, _), length in zip(found, lengths, strict=True) if length > max_seq_len]
    if too_long:
        number, length = too_long[0]
        more = f', and {len(too_long) - 1} more are too long' if too_long[1:] else ''
        raise ValueError(
            f'{file}:{number}: expected at most {max_seq_len} tokens (max_seq_len) with the answer, got {length}{more};'
            f' remove what is too long, or set max_seq_len={max(length for _, length in too_long)}'
        )
    return len(found)


def examples(file: Path, preprocessing_fn: str | Mapping[str, str] | None) -> Iterator[tuple[int, Example]]:
    """Yield the examples of a file, each after the number of its line.

    Raises:
        ValueError: one line with the file and the number of a bad line in it.
    """
    function = _function(preprocessing_fn)
    if not file.is_file():
        raise ValueError(f'{file}: no such file; set variables.data to the folder of the examples')

    def example_of(row: dict[str, Any]) -> Example:
        example = function(row)
        for key in ('prompt', 'response') if 'messages' not in example else ():
            _text(example, key)
        return example

    yield from json_lines(file, example_of)


def _function(preprocessing_fn: str | Mapping[str, str] | None) -> Callable[[Any], Example]:
    if preprocessing_fn is None:
        return lambda row: row
    if not isinstance(preprocessing_fn, str):
        fields = dict(preprocessing_fn)
        return lambda row: {key: _text(row, field) for key, field in fields.items()}
    module, _, name = preprocessing_fn.partition(':')
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'preprocessing_fn: expected module:function, got {preprocessing_fn!r} ({error})') from None


def _lengths(examples: list[Example], folder: Path) -> Iterator[int]:
    """Tokens of each example with the end of text that foundry adds."""
    if any('messages' in example for example in examples):
        from transformers import AutoTokenizer  # its import takes seconds

        template = AutoTokenizer.from_pretrained(folder)
        if template.chat_template is None:
            raise ValueError(f'{folder}: the tokenizer has no chat template; set the preprocessing_fn of plain prompts')
        for example in examples:
            yield len(template.apply_chat_template(list(example['messages']))) + 1
        return
    tokenizer = read_tokenizer(folder)
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        prompts = tokenizer.encode_batch([example['prompt'] for example in batch])
        answers = tokenizer.encode_batch([example['response'] for example in batch], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            yield len(prompt.ids) + len(answer.ids) + 1
