"""See that a model's weights are complete, finite and of its config, before the model is used.

Transformers fills weights that it does not find with fresh ones and goes on; scores of such a model would mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from itt_composer.checks import is_file_name
from itt_composer.model import ITTConfig
from itt_composer.model.legacy import current_weight_name

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
NUMBERS = {f'torch.{name}' for name in ('float16', 'bfloat16', 'float32', 'float64', 'int64', 'int32', 'uint8', 'bool')}
AGAIN = 'copy the folder again, or export the checkpoint again'


def check_exported(folder: Path) -> None:
    """See that a Hugging Face folder holds a config and the weights that its config needs.

    Raises:
        ValueError: one line that says what is missing, damaged, not finite, or of another model.
    """
    config = read_folder_config(folder)
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        shapes |= {current_weight_name(name): list(weight.shape) for name, weight in checked_weights(file)}
    if not isinstance(config, (ITTConfig, LlamaConfig)):
        return  # The names in the files of other models need not be those in memory; load_model compares those.
    try:
        with torch.device('meta'):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # Of a stranger's config any.
        raise _unknown_config(folder, error) from None
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model._tied_weights_keys or [] if model.config.tie_word_embeddings else []
    check_fit(folder, shapes, {name: shape for name, shape in expected.items() if name not in tied or name in shapes})


def read_folder_config(folder: Path) -> PretrainedConfig:
    """The config in a Hugging Face folder; no code in the folder is run.

    Raises:
        ValueError: the folder has no config, or one that is not read.
    """
    if not (folder / 'config.json').is_file():
        raise ValueError(f'{folder}: no exported model in it, config.json is missing; export a checkpoint: itt export')
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Of a stranger's config any.
        raise _unknown_config(folder, error) from None


def _unknown_config(folder: Path, error: Exception) -> ValueError:
    reason = ' '.join(str(error).split())[:200]
    return ValueError(f'{folder / "config.json"}: not a config that is known here ({reason}); {AGAIN}')


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: one, or those that an index names.

    Raises:
        ValueError: no weights, a damaged index, a file that is missing or outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f'{folder}: no weights ({WEIGHTS}) in it; {AGAIN}')
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding='utf-8'))['weight_map'].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{folder / INDEX}: no index of weights ({type(error).__name__}: {error}); {AGAIN}') from None
    for name in names:
        if not is_file_name(name):
            raise ValueError(f'{folder / INDEX}: expected names of files in the folder, got {name!r}; {AGAIN}')
        if not (folder / name).is_file():
            raise ValueError(f'{folder}: {name} is missing, which {INDEX} names; {AGAIN}')
    return [folder / name for name in names]


def checked_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Each weight in a file, read and seen to be finite.

    Raises:
        ValueError: the file is cut or damaged, or a weight is not finite.
    """
    try:
        with safe_open(file, 'pt') as weights:
            for name in weights.keys():
                weight = weights.get_tensor(name)
                check_finite(file, [(name, weight)])
                yield name, weight
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{file}: not a complete file of weights ({error}); {AGAIN}') from None


def check_finite(path: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """See that weights are dense numbers, and none of them NaN or infinite.

    Raises:
        ValueError: the first that is not.
    """
    for name, weight in weights:
        kind = 'meta' if weight.is_meta else str(weight.layout if weight.layout != torch.strided else weight.dtype)
        if kind not in NUMBERS:
            raise ValueError(f'{path}: weight {name}: expected dense numbers, got a tensor of {kind}; {AGAIN}')
        if weight.is_floating_point() and not (finite := weight.isfinite()).all():
            value = weight[~finite][0].item()
            raise ValueError(
                f'{path}: weight {name}: expected finite numbers, got {value} in {int((~finite).sum())} of '
                f'{weight.numel()} places; use a checkpoint from before the training diverged'
            )


def check_fit(path: str | Path, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """See that the weights in ``path`` are those of its config, by name and shape.

    Raises:
        ValueError: the first that is not.
    """
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f'{path}: weight {name} is missing, which the model of this config has; {AGAIN}')
        if name not in expected:
            raise ValueError(f'{path}: weight {name} is not in a model of this config; {AGAIN}')
        if list(shapes[name]) != list(expected[name]):
            raise ValueError(
                f'{path}: weight {name}: expected shape {list(expected[name])} by the config, got '
                f'{list(shapes[name])}; {AGAIN}'
            )
