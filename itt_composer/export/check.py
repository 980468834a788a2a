"""What an exported folder must hold, seen before a model is made of it.

Transformers fills weights that it does not find with fresh ones and goes on; scores of such a model would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import itt_composer.model  # noqa: F401 (transformers then knows the model type)


def check_exported(folder: Path) -> None:
    """See that ``folder`` has a config, and the weights that the config asks for. Only names and shapes are read.

    Raises:
        ValueError: what is missing, or fits another model.
    """
    if not (folder / 'config.json').is_file():
        raise ValueError(f'no exported model in {folder}; make one: make export CHECKPOINT= OUT=')
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob('*.safetensors')):
        try:
            with safe_open(file, 'pt') as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f'{file}: not a whole file of weights ({error}); export the checkpoint again') from None
    if not shapes:
        raise ValueError(f'{folder}: a folder without weights (*.safetensors); export the checkpoint again')
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model._tied_weights_keys or [] if model.config.tie_word_embeddings else []
    check_fit(folder, shapes, {name: shape for name, shape in wanted.items() if name not in tied or name in shapes})


def check_fit(path: str | Path, shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """See that the weights in ``path`` are those ``wanted``, by name and shape.

    Raises:
        ValueError: the first that is not.
    """
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes or name not in wanted:
            where = 'its config has, and not in its weights' if name in wanted else 'in its weights, and not its config'
            raise ValueError(f'{path}: another shape of model: {name} is {where}')
        if list(shapes[name]) != list(wanted[name]):
            raise ValueError(
                f'{path}: another shape of model: {name} is {list(shapes[name])}, and its config asks for '
                f'{list(wanted[name])}'
            )
