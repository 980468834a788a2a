"""Text of a task that needs depth: following a permutation for k hops.

A document has a random permutation of eight letters, a pair for each letter, then a walk along it, then questions: a
number of hops, a letter, and the letter that the hops lead to.

    b e f a ...  .  b e c ...  3 b h  3 a f ...

One hop is a look-up in the context, as by an induction head; each further hop needs the result of the one before. The
lowest possible loss of a left-to-right model is known for each kind of token (``lowest_losses``), so a lower loss shows
a leak of future tokens. The task is of the family of k-hop induction heads (Sanford, Hsu and Telgarsky 2024), on which
looped layers were as good as deep models (Saunshi et al. 2025).

``python -m research k-hop data`` writes a source and a tokenizer for ``make data``; every number of hops is a domain.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer, models, pre_tokenizers

from itt_composer.atomic import write_json
from itt_composer.checks import read_json
from itt_composer.one_line import one_line_errors

LETTERS = 'abcdefgh'
DOMAINS = {f'hops_{hops}': hops for hops in (1, 2, 3, 4)}
QUESTIONS = 12
# A document between <s> and </s>: a sequence of this length is one document.
SEQ_LEN = 1 + 2 * len(LETTERS) + 1 + len(LETTERS) + 3 * QUESTIONS + 1 + 1
VOCABULARY = ['<unk>', '<s>', '</s>', '.', *LETTERS, *(str(hops) for hops in DOMAINS.values())]


def positions() -> dict[str, list[int]]:
    """Return the positions of each kind of token in a sequence of ``SEQ_LEN`` tokens."""
    n = len(LETTERS)
    walk = 1 + 2 * n + 1
    questions = walk + n + 1
    return {
        'pairs': list(range(1, 1 + 2 * n)),
        'walk': list(range(walk + 1, walk + n)),
        'number of hops': [questions],
        'letters asked': [questions + 3 * i + 1 for i in range(QUESTIONS)],
        'answers': [questions + 3 * i + 2 for i in range(QUESTIONS)],
    }


def lowest_losses() -> dict[str, float]:
    """Return the lowest possible mean loss of a left-to-right model for each kind of token, in nats."""
    n = len(LETTERS)
    return {
        'pairs': math.log(math.factorial(n)) / n,
        'walk': 0.0,
        'number of hops': math.log(len(DOMAINS)),
        'letters asked': math.log(n),
        'answers': 0.0,
    }


def document(hops: int, generator: np.random.Generator) -> str:
    """Return one document with questions of ``hops`` hops; its tokens are separated by spaces."""
    n = len(LETTERS)
    f, order = generator.permutation(n), generator.permutation(n)
    words = [LETTERS[i] for x in order for i in (x, f[x])] + ['.']
    place = generator.integers(n)
    for _ in range(n):
        words.append(LETTERS[place])
        place = f[place]
    words.append('.')
    for x in generator.integers(n, size=QUESTIONS):
        y = x
        for _ in range(hops):
            y = f[y]
        words += [str(hops), LETTERS[x], LETTERS[y]]
    return ' '.join(words)


def tokenizer() -> Tokenizer:
    """Return a tokenizer with a token for each word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def write_hops(out: Path, documents: int, seed: int) -> None:
    """Write ``out/source/<domain>/documents.jsonl`` and ``out/tokenizer``; nothing where they exist already.

    Args:
        out: an empty folder.
        documents: for each number of hops.
        seed: of the documents.

    Raises:
        ValueError: fewer than one document, or other text in ``out``.
    """
    if documents < 1:
        raise ValueError(f'--documents: expected 1 or more, got {documents}')
    settings = {'documents': documents, 'seed': seed}
    if (there := read_json(out / 'hops.json')) is not None:
        if there != settings:
            raise ValueError(f'--out: {out} holds the text of {there}; set another folder, or remove this one')
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'--out: {out} holds something else, or unfinished text; remove it, or set another folder')
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), unk_token='<unk>', pad_token='<unk>', bos_token='<s>', eos_token='</s>'
    )
    fast.save_pretrained(out / 'tokenizer')
    for name, hops in DOMAINS.items():
        folder = out / 'source' / name
        folder.mkdir(parents=True)
        with open(folder / 'documents.jsonl', 'w', encoding='utf-8') as file:
            generator = np.random.default_rng([seed, hops])
            file.writelines(json.dumps({'text': document(hops, generator)}) + '\n' for _ in range(documents))
    write_json(settings, out / 'hops.json')


def main(
    out: Annotated[Path, typer.Option(help='Folder for the text and its tokenizer.')],
    documents: Annotated[int, typer.Option(help='Documents for each number of hops.')] = 30_000,
    seed: Annotated[int, typer.Option(help='Seed of the documents.')] = 17,
) -> None:
    """Write the text of the k-hop task, and its tokenizer, for ``make data``."""
    with one_line_errors('k-hop data'):
        write_hops(out, documents, seed)
