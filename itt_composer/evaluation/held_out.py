"""Held-out sequences for measurements and thresholds after training.

They are those of a folder that ``itt data`` wrote, or the test examples of a folder with ``test.jsonl``, whose labels
are the answers' tokens. N sequences of S tokens; examples differ in S.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from streaming import LocalDataset
from torch import Tensor
from transformers import PretrainedConfig

from itt_composer.config.examples import examples
from itt_composer.export.load import load_tokenizer
from itt_composer.model.loss import IGNORED

USUAL_SEQUENCES = 64
TEST_EXAMPLES = 'test.jsonl'


@dataclass(frozen=True)
class HeldOut:
    """N sequences and the labels of their losses."""

    ids_N: list[Tensor]
    """Token ids, int64 [S] each."""
    labels_N: list[Tensor]
    """The same, -100 where a token is not predicted."""

    @property
    def mean_length(self) -> int:
        """S, in the mean over sequences that differ in it."""
        return round(sum(map(len, self.ids_N)) / len(self.ids_N))

    @classmethod
    def of_rows(cls, rows_NS: Tensor) -> HeldOut:
        """Sequences of one length, each token of which is predicted."""
        return cls(list(rows_NS), list(rows_NS))

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Return two halves of the sequences, in random order: neighbours may be of one domain."""
        order = torch.randperm(len(self.ids_N), generator=torch.Generator().manual_seed(0)).tolist()
        half = len(order) - len(order) // 2
        first, second = (
            HeldOut([self.ids_N[i] for i in part], [self.labels_N[i] for i in part])
            for part in (order[:half], order[half:])
        )
        return first, second


def batches(sequences: Sequence[Tensor] | Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield ``size`` sequences at a time, fewer where the next one differs in length; [B, S] each."""
    for _, group in groupby(sequences, len):
        for ids_BS in torch.stack(list(group)).split(size):
            yield ids_BS.to(device)


def held_out(data: Path, count: int | None, model: Path, config: PretrainedConfig) -> HeldOut:
    """Return ``count`` held-out sequences of a folder, or its first ``count`` test examples; 64 without a count.

    Args:
        data: a folder of ``itt data``, or one with ``test.jsonl``.
        count: their number.
        model: the folder or checkpoint of the model, for its tokenizer.
        config: of the model.

    Raises:
        ValueError: too few of them, or tokens outside the model's vocabulary or context.
    """
    if not (data / TEST_EXAMPLES).is_file():
        return HeldOut.of_rows(held_out_rows(data, count, config))
    file, tokenizer = data / TEST_EXAMPLES, load_tokenizer(model)
    sequences = HeldOut([], [])
    for number, example in islice(examples(file, 'itt_composer.config.examples:plain'), count or USUAL_SEQUENCES):
        prompt = tokenizer(example['prompt']).input_ids
        answer = [*tokenizer(example['response'], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids_S = torch.tensor(prompt + answer)
        if len(ids_S) > config.max_position_embeddings or ids_S.max() >= config.vocab_size:
            raise ValueError(
                f'{file}:{number}: expected at most {config.max_position_embeddings} tokens with ids below '
                f'{config.vocab_size}, got {len(ids_S)} with ids up to {int(ids_S.max())}; remove the example'
            )
        sequences.ids_N.append(ids_S)
        sequences.labels_N.append(torch.tensor([IGNORED] * len(prompt) + answer))
    _check_count(file, len(sequences.ids_N), count, 'add examples')
    return sequences


def held_out_rows(data: Path, count: int | None, config: PretrainedConfig) -> Tensor:
    """Return the first ``count`` validation sequences, one of each domain in turn; int64 [N, S].

    S is the sequence length of the data, at most the model's context. Without a count, N is 64, or with a warning all
    that there are, two or more.

    Raises:
        ValueError: no validation shards, too few sequences, or tokens outside the model's vocabulary.
    """
    in_turn = chain.from_iterable(zip_longest(*_rows_of_domains(data).values()))
    rows = list(islice((row for row in in_turn if row is not None), count or USUAL_SEQUENCES))
    _check_count(data / 'validation', len(rows), count, 'make the data again with more validation tokens')
    return _stacked(rows, data, config)


def _check_count(place: Path, found: int, count: int | None, more: str) -> None:
    """Refuse fewer sequences than were asked for, and without a count fewer than two; warn of fewer than 64."""
    if found < (count or 2):
        raise ValueError(
            f'sequences: expected at most {found}, the number in {place}, got {count}'
            if count
            else f'{place}: expected at least 2 sequences, got {found}; {more}'
        )
    if found < (count or USUAL_SEQUENCES):
        warnings.warn(f'sequences: {place} has {found}, not {USUAL_SEQUENCES}; all are used', stacklevel=3)


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
