"""Held-out sequences of a data folder that ``itt data`` wrote, for measurements and thresholds after training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from streaming import LocalDataset
from torch import Tensor
from transformers import PretrainedConfig

USUAL_SEQUENCES = 64


def held_out_rows(data: Path, count: int | None, config: PretrainedConfig) -> Tensor:
    """Return the first ``count`` validation sequences, one of each domain in turn; int64 [N, S].

    S is the sequence length of the data, at most the model's context. Without a count, N is 64, or with a warning all
    that there are, two or more.

    Raises:
        ValueError: no validation shards, too few sequences, or tokens outside the model's vocabulary.
    """
    in_turn = chain.from_iterable(zip_longest(*_rows_of_domains(data).values()))
    rows = list(islice((row for row in in_turn if row is not None), count or USUAL_SEQUENCES))
    if len(rows) < (count or 2):
        todo = 'set fewer' if count else 'two are needed; make the data again with more validation tokens'
        raise ValueError(f'sequences: {data / "validation"} has {len(rows)}, got {count or USUAL_SEQUENCES}; {todo}')
    if len(rows) < (count or USUAL_SEQUENCES):
        warnings.warn(
            f'sequences: {data / "validation"} has {len(rows)}, not {USUAL_SEQUENCES}; all are used', stacklevel=2
        )
    return _stacked(rows, data, config)


def rows_by_domain(data: Path, count: int, config: PretrainedConfig, split: str = 'validation') -> dict[str, Tensor]:
    """Return the first ``count`` sequences of each domain (all of a domain that has fewer); int64 [N, S] each.

    Raises:
        ValueError: no shards, or tokens outside the model's vocabulary.
    """
    domains = {domain: list(islice(rows, count)) for domain, rows in _rows_of_domains(data, split).items()}
    return {domain: _stacked(rows, data, config) for domain, rows in domains.items() if rows}


def _rows_of_domains(data: Path, split: str = 'validation') -> dict[str, Iterator[np.ndarray]]:
    domains = sorted(index.parent for index in (data / split).glob('*/index.json'))
    if not domains:
        raise ValueError(f'{data / split}: no {split} shards in it; make them: itt data --out {data}')
    return {domain.name: _tokens(LocalDataset(str(domain))) for domain in domains}


def _tokens(dataset: LocalDataset) -> Iterator[np.ndarray]:
    for i in range(len(dataset)):
        yield dataset[i]['tokens']


def _stacked(rows: list[np.ndarray], data: Path, config: PretrainedConfig) -> Tensor:
    # Longer sequences are cut, as in training.
    rows_NS = torch.from_numpy(np.stack(rows)[:, : config.max_position_embeddings].astype(np.int64))
    if rows_NS.max() >= config.vocab_size:
        raise ValueError(
            f'{data}: expected token ids below {config.vocab_size}, the vocabulary of the model, got '
            f"{int(rows_NS.max())}; use data made with the model's tokenizer"
        )
    return rows_NS
