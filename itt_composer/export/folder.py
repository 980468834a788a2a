"""A checkpoint becomes a model, and the model a Hugging Face folder."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from itt_composer.atomic import atomic_folder
from itt_composer.export.check import check_fit
from itt_composer.export.checkpoint import Checkpoint, read_checkpoint
from itt_composer.export.model_card import RunFigures, model_card
from itt_composer.export.standalone import modeling_source
from itt_composer.model import ITTConfig, ITTForCausalLM

MODELING = 'modeling_itt'
MAX_SHARD_SIZE = '5GB'


def export(
    checkpoint: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    tensorboard: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a Composer checkpoint into a Hugging Face folder.

    Args:
        checkpoint: a ``.pt`` file, a sharded folder, or a folder of checkpoints, whose latest is taken.
        out: the folder to write.
        dtype: of the parameters; None keeps the checkpoint's. Routing thresholds stay in float32.
        tokenizer: folder or hub name; None takes the one in the checkpoint.
        tensorboard: the run's TensorBoard folder, for the card; None looks where the run files put it.
        overwrite: put the new folder in the place of one that is there.

    Returns:
        ``out``.

    Raises:
        ValueError: no checkpoint there, one whose weights do not fit its config, a folder that is there already, no
            tokenizer.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f'{out}: already there; name another folder, or pass --overwrite')
    read = read_checkpoint(checkpoint)
    if read.path.is_relative_to(out.resolve()):
        raise ValueError(f'{out}: the checkpoint is in it; name another folder')
    if not read.tokenizer and tokenizer is None:
        raise ValueError(f'{checkpoint}: no tokenizer in it; pass --tokenizer=<folder or hub name>')
    model = build_model(read, dtype)
    figures = RunFigures.of(read, tensorboard)
    with atomic_folder(out, own=lambda there: (there / 'config.json').is_file()) as folder:
        save_model(model, folder, figures)
        save_tokenizer(read.tokenizer, tokenizer, folder)
        name_inputs(folder)
    return out


def build_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> ITTForCausalLM:
    """The model of a checkpoint, with the checkpoint's own tensors as its parameters."""
    config = ITTConfig.from_dict(checkpoint.config)
    with torch.device('meta'):
        model = ITTForCausalLM(config)
    shapes, wanted = ({name: x.shape for name, x in held.items()} for held in (checkpoint.weights, model.state_dict()))
    check_fit(checkpoint.path, shapes, wanted)
    model.load_state_dict(checkpoint.weights, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return model.eval()


def servable(model: ITTForCausalLM) -> PreTrainedModel:
    """The model in the form that is saved: a plain one as ordinary LLaMA, another with the pointer to its own code.

    The parameters are shared with ``model``, which is not changed.
    """
    if model.config.thinking == 'none':
        shared = inspect.signature(ITTConfig.__init__).parameters.keys() & inspect.signature(LlamaConfig).parameters
        values = {key: getattr(model.config, key) for key in shared if key not in ('self', 'kwargs')}
        target: PreTrainedModel = _with_weights(LlamaForCausalLM, LlamaConfig(**values), model.state_dict())
    else:
        config = ITTConfig.from_dict(model.config.to_dict())
        config.tokenizer_class = 'PreTrainedTokenizerFast'  # Pipelines load none for a config they do not know.
        config.auto_map = {
            'AutoConfig': f'{MODELING}.{ITTConfig.__name__}',
            'AutoModelForCausalLM': f'{MODELING}.{ITTForCausalLM.__name__}',
        }
        target = _with_weights(ITTForCausalLM, config, model.state_dict())
    target.generation_config = GenerationConfig(
        bos_token_id=target.config.bos_token_id,
        eos_token_id=target.config.eos_token_id,
        pad_token_id=target.config.eos_token_id,
    )
    return target


def save_model(model: ITTForCausalLM, folder: Path, figures: RunFigures) -> None:
    """Weights as safetensors, config, generation config, modelling file and card of ``model``."""
    servable(model).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    save_code_and_card(model.config, folder, figures)


def save_code_and_card(config: PretrainedConfig, folder: Path, figures: RunFigures) -> None:
    """The files beside the weights of a model that trained with ``config``."""
    if config.thinking != 'none':
        (folder / f'{MODELING}.py').write_text(modeling_source())
    (folder / 'README.md').write_text(model_card(config, figures))


def save_tokenizer(files: dict[str, Any], name: str | None, folder: Path) -> None:
    """The tokenizer of that name, or without one the files that the checkpoint holds."""
    if name is not None:
        try:
            AutoTokenizer.from_pretrained(name).save_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f'tokenizer {name}: {" ".join(str(error).split())[:200]}') from None
        return
    for file, content in files.items():
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        elif file.endswith('.txt'):
            (folder / file).write_text('\n'.join(content), encoding='utf-8')
        elif file.endswith('.json'):
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        else:
            (folder / file).write_text(content, encoding='utf-8')


def name_inputs(folder: Path) -> None:
    """Have the folder's tokenizer give what the models take; a bare fast one gives ``token_type_ids`` too."""
    file = folder / 'tokenizer_config.json'
    if file.is_file():
        config = json.loads(file.read_text(encoding='utf-8'))
        config.setdefault('model_input_names', ['input_ids', 'attention_mask'])
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _with_weights(cls: type[Any], config: PretrainedConfig, weights: dict[str, Tensor]) -> Any:
    with torch.device('meta'):
        model = cls(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
