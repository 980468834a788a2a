"""Rows of random tokens, what a model gives the next token of each, and a tokenizer."""

from __future__ import annotations

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ITT = dict(thinking='itt', token_ratios=[0.7, 0.7, 0.7])


def rows(count: int = 3, S: int = 17, vocabulary: int = 97, seed: int = 3) -> Tensor:
    """Token ids [count, S]."""
    return torch.randint(3, vocabulary, (count, S), generator=torch.Generator().manual_seed(seed))


def log_p_of_next(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Log-probability of each next token, [B, S - 1]."""
    return logits_BSV.log_softmax(-1)[:, :-1].gather(-1, ids_BS[:, 1:, None]).squeeze(-1)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, as GPT-2's."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(['Question: Options: A) B) C) D) E) Answer: A Explanation: it is'], 320)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token='<s>', eos_token='</s>')
