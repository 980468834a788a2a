"""A checkpoint, or a folder that a Trainer saved, becomes a Hugging Face folder that stands alone."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from itt_composer.atomic import atomic_folder
from itt_composer.export.checkpoint import read_checkpoint
from itt_composer.export.load import as_ours, build_model, load_folder, own_config
from itt_composer.export.model_card import RunFigures, model_card
from itt_composer.export.tokenizer import name_inputs, save_tokenizer
from itt_composer.model import ITTForCausalLM
from itt_composer.options import ModelOptions

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = '5GB'


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    tensorboard: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a Composer checkpoint, or a folder that ``save_pretrained`` wrote, into a Hugging Face folder.

    Args:
        checkpoint: a ``.pt`` file, a sharded folder, a folder of checkpoints, whose latest is taken, or a Hugging Face
            folder, such as a Trainer saves.
        out: the folder to write.
        dtype: of the parameters; None keeps the checkpoint's. Routing thresholds stay in float32.
        tokenizer: folder or hub name; None takes the one in the checkpoint.
        tensorboard: the run's TensorBoard folder, for the card; None looks where the training configs put it.
        overwrite: put the new folder in the place of one that is there.

    Returns:
        ``out``.

    Raises:
        ValueError: no checkpoint there, weights that are missing, damaged, not finite or of another config, a folder
            that is there already, no tokenizer.
    """
    out, source = Path(out), Path(checkpoint)
    if out.exists() and not overwrite:
        raise ValueError(f'{out}: already there; name another folder, or pass --overwrite')
    if (source / 'config.json').is_file():
        model, figures, files = as_ours(load_folder(source, 'auto'), source), RunFigures(), {}
        folders = [source, *([Path(model.config.pretrained_from)] if model.config.pretrained_from else [])]
        with_one = [folder for folder in folders if (folder / 'tokenizer_config.json').is_file()]
        if tokenizer is None and with_one:
            tokenizer = str(with_one[0])
        if tokenizer is None:
            log.warning(f'{source}: no tokenizer in it, so the export has none; pass --tokenizer to add one')
    else:
        read = read_checkpoint(source)
        if not read.tokenizer and tokenizer is None:
            raise ValueError(f'{source}: no tokenizer in it; pass --tokenizer=<folder or hub name>')
        model, figures, files = build_model(read), RunFigures.of(read, tensorboard), read.tokenizer
        source = read.path
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the checkpoint is in it; name another folder')
    with atomic_folder(out, own=lambda there: (there / 'config.json').is_file()) as folder:
        save_model(model, folder, figures)
        save_tokenizer(files, tokenizer, folder)
        name_inputs(folder)
    return out


def servable(model: ITTForCausalLM) -> PreTrainedModel:
    """The model in the form that is saved: a dense baseline as ordinary LLaMA where it is one, another with its code.

    The parameters are shared with ``model``, which is not changed.
    """
    if model.config.is_llama:
        shared = {*ModelOptions.keys(), 'pad_token_id'} & inspect.signature(LlamaConfig).parameters.keys()
        values = {key: getattr(model.config, key) for key in shared}
        values['attention_bias'] = model.config.qkv_bias
        target: PreTrainedModel = _with_weights(LlamaForCausalLM, LlamaConfig(**values), model.state_dict())
    else:
        config = own_config(model.config.to_dict())
        config.tokenizer_class = 'PreTrainedTokenizerFast'  # Pipelines load none for a config they do not know.
        target = _with_weights(ITTForCausalLM, config, model.state_dict())
    target.generation_config = copy.deepcopy(model.generation_config)
    if target.generation_config.pad_token_id is None:
        ends = target.config.eos_token_id
        target.generation_config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return target


def save_model(model: ITTForCausalLM, folder: Path, figures: RunFigures) -> None:
    """Weights as safetensors, config, generation config, modelling file and card of ``model``."""
    servable(model).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    save_card(model.config, folder, figures)


def save_card(config: PretrainedConfig, folder: Path, figures: RunFigures) -> None:
    """The card of a model that trained with ``config``."""
    (folder / 'README.md').write_text(model_card(config, figures), encoding='utf-8')


def _with_weights(cls: type[Any], config: PretrainedConfig, weights: dict[str, Tensor]) -> Any:
    with torch.device('meta'):
        model = cls(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
