"""What the trained models do with a held-out text: continuations, and where the extra steps of ITT run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from itt_composer.analysis.token_page import Passage
from itt_composer.evaluation.held_out import rows_by_domain
from itt_composer.evaluation.tokens import passage_of_ids
from itt_composer.export.load import as_routed, load
from research.figures.measurements import paragraph

PROMPT_TOKENS, NEW_TOKENS, PASSAGE_TOKENS, TEMPERATURE = 32, 40, 96, 0.8


@dataclass
class Samples:
    """``prompt`` is held-out text; ``continuations`` go from the model's name to the text that it adds."""

    prompt: str
    continuations: dict[str, str]
    passage: Passage
    """The text in tokens with the steps of the ITT model."""


def sample(checkpoints: dict[str, Path], data: Path) -> Samples:
    """Continue a held-out text with each model, and record where the extra steps of the last one run.

    Args:
        checkpoints: the models' names to their checkpoint folders; the last model is the ITT model.
        data: the folder that ``make data`` wrote.
    """
    models = {name: load(path) for name, path in checkpoints.items()}
    name = list(checkpoints)[-1]
    itt, tokenizer = as_routed(models[name][0], checkpoints[name]), models[name][1]
    sequences_NS = next(iter(rows_by_domain(data, 8, itt.config).values()))
    ids = paragraph(sequences_NS, itt.config.bos_token_id, PASSAGE_TOKENS)
    continuations = {
        name: tokenizer.decode(_continue(model, ids[:PROMPT_TOKENS])) for name, (model, _) in models.items()
    }
    prompt = tokenizer.decode(ids[:PROMPT_TOKENS], skip_special_tokens=True)
    return Samples(prompt, continuations, passage_of_ids(itt, tokenizer, 'A held-out text', ids))


@torch.no_grad()
def _continue(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Sample new tokens, with one seed for all models."""
    torch.manual_seed(0)
    ids_1S = torch.tensor([prompt], device=model.device)
    out_1S = model.generate(
        ids_1S, attention_mask=torch.ones_like(ids_1S), max_new_tokens=NEW_TOKENS, do_sample=True,
        temperature=TEMPERATURE, top_k=0, pad_token_id=0,
    )  # fmt: skip
    return out_1S[0, len(prompt) :].tolist()
