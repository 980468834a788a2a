"""A pretrained model, its tokenizer and a few questions with answers, all made here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from itt_composer.config.examples import plain

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def write_tokenizer(folder: Path, more: int = 0) -> PreTrainedTokenizerFast:
    """A token per byte, one for the end of a text, and ``more`` that no text has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(['<|end|>', *(f'<|{i}|>' for i in range(more))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|end|>', bos_token='<|end|>')
    fast.save_pretrained(folder)
    return fast


def write_pretrained(folder: Path, seed: int = 0, config: object = None) -> Path:
    """A LLaMA of random weights, or a model of ``config``, with its tokenizer."""
    tokenizer = write_tokenizer(folder)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=256, eos_token_id=256, max_position_embeddings=192)
    config = config or LlamaConfig(**SHAPE, **ids, initializer_range=0.2)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def questions(count: int) -> list[dict[str, str]]:
    """Sums, with answers of different lengths in GSM8K's form."""
    rows = []
    for i in range(count):
        steps = '\n'.join(f'{i} + {j} = <<{i}+{j}={i + j}>>{i + j}' for j in range(1, 2 + i % 3))
        rows.append({'question': f'What is {i} plus {1 + i % 3}?', 'answer': f'{steps}\n#### {i + 1 + i % 3}'})
    return rows


def write_questions(folder: Path, train: int = 12, test: int = 5) -> Path:
    """``train.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (('train', train), ('test', test)):
        lines = [json.dumps(row) + '\n' for row in questions(count)]
        (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')
    return folder


def answer_loss(folder, file):
    """The mean loss over the tokens of all answers and of their ends, one text at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses = []
    for line in file.open():
        example = plain(json.loads(line))
        prompt, answer = (tokenizer(example[key])['input_ids'] for key in ('prompt', 'response'))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[0, len(prompt) :], reduction='none'))
    return torch.cat(losses).mean().item()
