"""The one way to load a model: checkpoints and exported folders of this package, or any causal LM of Hugging Face.

No code in a folder or a checkpoint is run, and the weights are checked (:mod:`itt_composer.export.check`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from itt_composer.deprecated import current_names
from itt_composer.export.check import AGAIN, check_exported, check_finite, check_fit
from itt_composer.export.checkpoint import Checkpoint, read_checkpoint
from itt_composer.export.tokenizer import save_tokenizer
from itt_composer.model import ITTConfig, ITTForCausalLM
from itt_composer.model.pretrained_dense import check_complete
from itt_composer.options import ModelOptions

# Of a config from outside what is taken beside the model's own keys; others may name code.
OTHER_CONFIG_KEYS = ('calibrated_thresholds', 'pad_token_id', 'pretrained_from', 'torch_dtype')


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model at ``path``, as :func:`load_model` loads it, and its tokenizer.

    Raises:
        ValueError: neither is there, or the tokenizer is not a fast one.
    """
    return load_model(path), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the model at ``path``.

    Raises:
        ValueError: it is not there, or not a fast one.
    """
    if (path / 'config.json').is_file():
        return _tokenizer(path, path)
    checkpoint = read_checkpoint(path, with_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(checkpoint.tokenizer, None, Path(folder))
        return _tokenizer(Path(folder), checkpoint.path)


def load_model(path: Path) -> PreTrainedModel:
    """The model at ``path`` for evaluation, on a GPU where there is one.

    Args:
        path: a Hugging Face folder, exported by this package or not; or a Composer checkpoint: a ``.pt`` file, a
            sharded one, or the folder that a run saved its checkpoints in.

    Raises:
        ValueError: no model there, or weights that are missing, damaged, not finite, or of another model.
    """
    if not (path / 'config.json').is_file():
        return _for_evaluation(build_model(read_checkpoint(path)))
    return _for_evaluation(load_folder(path))


def load_folder(folder: Path, dtype: str | None = None) -> PreTrainedModel:
    """The model in a Hugging Face folder, on the CPU, in float32 or with ``auto`` in the dtype of its weights.

    Raises:
        ValueError: as :func:`load_model` does.
    """
    check_exported(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # A stranger's folder may raise any.
        raise ValueError(f'{folder}: not loaded ({" ".join(str(error).split())[:200]}); {AGAIN}') from None
    check_complete(folder, report, AGAIN)
    return model


def build_model(checkpoint: Checkpoint) -> ITTForCausalLM:
    """The model of a checkpoint, with the checkpoint's own tensors as its parameters.

    Raises:
        ValueError: weights that are missing, not finite or of another config.
    """
    with torch.device('meta'):
        model = ITTForCausalLM(own_config(checkpoint.config))
    shapes, wanted = ({name: x.shape for name, x in held.items()} for held in (checkpoint.weights, model.state_dict()))
    check_fit(checkpoint.path, shapes, wanted)
    check_finite(checkpoint.path, checkpoint.weights.items())
    for name, weight in model.named_parameters():
        if not checkpoint.weights[name].is_floating_point():
            raise ValueError(f'{checkpoint.path}: weight {name}: expected {weight.dtype}, got whole numbers; {AGAIN}')
    model.load_state_dict(checkpoint.weights, assign=True)
    model.tie_weights()
    return model.eval()


def own_config(config: dict[str, Any]) -> ITTConfig:
    """The config without keys that are not the model's own."""
    keys = {*ModelOptions.keys(), *OTHER_CONFIG_KEYS}
    return ITTConfig.from_dict({key: value for key, value in current_names(config).items() if key in keys})


def load_routed(path: Path) -> ITTForCausalLM:
    """The model at ``path``, which has to be one that routes tokens.

    Raises:
        ValueError: as :func:`load_model` and :func:`as_routed` do.
    """
    return as_routed(load_model(path), path)


def as_ours(model: PreTrainedModel, path: Path) -> ITTForCausalLM:
    """The model in this package's form, which shows its layers and steps; another family's becomes a dense baseline.

    Raises:
        ValueError: a model of another kind; ``path`` is what the message calls it.
    """
    if isinstance(model, ITTForCausalLM):
        return model
    try:
        return ITTForCausalLM.from_pretrained_dense(model).eval()
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def as_routed(model: PreTrainedModel, path: Path) -> ITTForCausalLM:
    """The model, which has to be one that routes tokens.

    Raises:
        ValueError: it does not; ``path`` is what the message calls it.
    """
    ours = as_ours(model, path)
    if ours.selection is None:
        raise ValueError(f'{path}: expected a model that routes tokens, got thinking: {ours.config.thinking}')
    return ours


def _for_evaluation(model: PreTrainedModel) -> PreTrainedModel:
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()


def _tokenizer(folder: Path, path: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # A damaged file may raise any.
        raise ValueError(f'{path}: no tokenizer in it ({" ".join(str(error).split())[:120]})') from None
    if not tokenizer.is_fast:
        raise ValueError(f'{path}: expected a fast tokenizer (tokenizer.json), got a {type(tokenizer).__name__}')
    return tokenizer
