"""A small data folder in the layout of ``make data``, written with streaming's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TOKENS = ['<unk>', '<s>', '</s>', *(chr(code) for code in range(33, 90))]


def write_data(
    folder: Path, train: dict[str, int], validation: dict[str, int], row_length: int = 32, seed: int = 0
) -> Path:
    """Random rows of ``row_length`` uint16 tokens, ``train[domain]`` of them for each domain, and a tokenizer."""
    from streaming import MDSWriter

    generator = np.random.default_rng(seed)
    for split, rows in (('train', train), ('validation', validation)):
        for domain, count in rows.items():
            columns = {'tokens': f'ndarray:uint16:{row_length}'}
            with MDSWriter(out=str(folder / split / domain), columns=columns, hashes=['xxh64']) as writer:
                for _ in range(count):
                    writer.write({'tokens': generator.integers(3, len(TOKENS), row_length).astype(np.uint16)})
    write_tokenizer(folder / 'tokenizer')
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of ``TOKENS`` as a Hugging Face folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    fast.save_pretrained(str(folder))
