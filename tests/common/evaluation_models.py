"""Documents of the real evaluation sets, and exported models with LLaMA's tokenizer that are scored on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from itt_composer.evaluation.convert import SOURCES
from itt_composer.export.folder import save_model
from itt_composer.export.model_card import RunFigures
from itt_composer.model import ITTConfig, ITTForCausalLM, thinking_layers

SHAPE = dict(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=768,
    embedding_initializer_range=0.5,
    initializer_range=0.1,
)
THINKING = dict(thinking='itt', thinking_steps=3, router_initializer_range=0.2)


def write_source(shared: Path, folder: Path, lines: int = 48) -> Path:
    """The first lines of each real file."""
    for name in SOURCES:
        rows = (shared / 'data' / 'eval' / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(''.join(rows[:lines]))
    return folder


def write_models(tokenizer: Path, folder: Path) -> Path:
    """Exported folders ``llama`` and ``itt`` of a dense and an ITT model with random weights."""
    for name, options in (('llama', {}), ('itt', THINKING)):
        torch.manual_seed(3)
        model = ITTForCausalLM(ITTConfig(**SHAPE, **options))
        for layer in thinking_layers(model).values():
            layer.threshold_updates += 1
        shutil.copytree(tokenizer, folder / name)
        save_model(model, folder / name, RunFigures())
    return folder
