"""The models that pictures are made of: checkpoints and exported folders of ours, or any causal LM of Hugging Face."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from itt_composer.export.checkpoint import read_checkpoint
from itt_composer.export.folder import build_model, save_tokenizer
from itt_composer.model import ITTForCausalLM


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model at ``path`` for evaluation, on a GPU where there is one, and its tokenizer.

    Args:
        path: a Hugging Face folder, exported by this package or not; or a Composer checkpoint: a ``.pt`` file, a
            sharded one, or the folder that a run saved its checkpoints in.

    Raises:
        ValueError: neither is there, or it has no tokenizer.
    """
    if (path / 'config.json').is_file():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), _tokenizer(path, path)
    else:
        checkpoint = read_checkpoint(path)
        model = build_model(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(checkpoint.tokenizer, None, Path(folder))
            tokenizer = _tokenizer(Path(folder), path)
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval(), tokenizer


def as_ours(model: PreTrainedModel, path: Path) -> ITTForCausalLM:
    """The model in this package's form, which shows its layers and steps; an ordinary LLaMA becomes a plain one.

    Raises:
        ValueError: a model of another kind; ``path`` is what the message calls it.
    """
    if isinstance(model, LlamaForCausalLM):
        model = ITTForCausalLM.from_llama(model).to(model.device).eval()
    if not isinstance(model, ITTForCausalLM):
        raise ValueError(f'{path}: a {type(model).__name__}; this needs a model of this package or a LLaMA')
    return model


def as_routed(model: PreTrainedModel, path: Path) -> ITTForCausalLM:
    """The model, which has to be one that routes tokens.

    Raises:
        ValueError: it does not; ``path`` is what the message calls it.
    """
    ours = as_ours(model, path)
    if ours.selection is None:
        raise ValueError(f'{path}: the model routes no tokens (thinking: {ours.config.thinking})')
    return ours


def _tokenizer(folder: Path, path: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: no tokenizer in it ({" ".join(str(error).split())[:120]})') from None
    if not tokenizer.is_fast:
        raise ValueError(f'{path}: its tokenizer has no tokenizer.json, which the pictures need')
    return tokenizer
