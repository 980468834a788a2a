"""AQuA's questions as samples: a prompt, five letters to choose from, the solution."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = 'ABCDE'
TRAIN, TEST = 'aqua_dev.jsonl', 'aqua_test.jsonl'


@dataclass
class Sample:
    """One question in tokens. The complete text is prompt, letter, solution."""

    prompt: list[int]
    options: list[list[int]]
    """The tokens of each letter after the prompt."""
    correct: int
    solution: list[int]
    """The tokens after the right letter: the rationale, cut where the model's context ends."""

    @property
    def tokens(self) -> Tensor:
        """Prompt, right letter and solution, [1, S]."""
        return torch.tensor([self.prompt + self.options[self.correct] + self.solution])

    def labels(self, with_solution: bool) -> Tensor:
        """``tokens`` where the loss counts: the right letter, and the solution if asked for; -100 elsewhere."""
        tokens, start = self.tokens, len(self.prompt)
        end = tokens.shape[1] if with_solution else start + len(self.options[self.correct])
        labels = torch.full_like(tokens, -100)
        labels[:, start:end] = tokens[:, start:end]
        return labels


def read_samples(file: Path, count: int, tokenizer: PreTrainedTokenizerFast, context: int) -> list[Sample]:
    """The first ``count`` samples of a file whose question fits the context.

    Raises:
        ValueError: no such file, or one that is not AQuA.
    """
    if not file.is_file():
        raise ValueError(f'{file}: no such file; set the folder with {TRAIN} and {TEST} (AQuA, Ling et al. 2017)')
    samples = []
    for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), start=1):
        try:
            entry = json.loads(line)
            sample = _sample(entry, tokenizer, context)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}:{number}: not a question of AQuA ({type(error).__name__}: {error})') from None
        if sample is not None:
            samples.append(sample)
        if len(samples) == count:
            break
    return samples


def _sample(entry: dict, tokenizer: PreTrainedTokenizerFast, context: int) -> Sample | None:
    prompt = 'Question: ' + entry['question'] + '\nOptions: ' + ' '.join(entry['options']) + '\nAnswer:'
    prompt_ids = tokenizer(prompt, verbose=False)['input_ids']
    options = [_after(tokenizer, prompt, f' {letter}') for letter in LETTERS]
    correct = LETTERS.index(entry['correct'])
    solution = _after(tokenizer, f'{prompt} {entry["correct"]}', f'\nExplanation: {entry["rationale"]}')
    room = context - len(prompt_ids) - max(map(len, options))
    return Sample(prompt_ids, options, correct, solution[:room]) if room > 0 else None


def _after(tokenizer: PreTrainedTokenizerFast, text: str, addition: str) -> list[int]:
    """The tokens that ``addition`` adds to the text's; a tokenizer that ends its texts with a token does so to both."""
    before, whole = (tokenizer(part, verbose=False)['input_ids'] for part in (text, text + addition))
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole[same:]


@torch.no_grad()
def answers_correctly(model: PreTrainedModel, sample: Sample) -> bool:
    """Whether the right letter is the likeliest of the five."""
    log_p = []
    for option in sample.options:
        logits_SV = model(torch.tensor([sample.prompt + option], device=model.device)).logits[0].float()
        log_p_CV = logits_SV[len(sample.prompt) - 1 : -1].log_softmax(-1)
        option_C = torch.tensor(option, device=model.device)
        log_p.append(log_p_CV.gather(1, option_C[:, None]).sum().item())
    return max(range(len(log_p)), key=log_p.__getitem__) == sample.correct
