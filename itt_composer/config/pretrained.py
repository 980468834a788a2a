"""``model.pretrained``: a training config whose model starts from one that is trained already.

The shape comes from that model's ``config.json`` and is filled in before the config is checked, so that the checks, the
FLOPs and the manifest see the complete model. What can be refused without torch is refused before it is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from itt_composer.checks import read_json
from itt_composer.config.arguments import with_where
from itt_composer.data_folder import read_tokenizer, vocabulary_size
from itt_composer.deprecated import current_names
from itt_composer.families import FAMILIES
from itt_composer.options import ModelOptions

SHAPE = ModelOptions.keys()[: ModelOptions.keys().index('router_initializer_range')]
"""Options that describe the decoder, which come first; all others say how it thinks and how it is computed."""

# How a model is computed is not part of what it is.
COMPUTED = ('attention_backend', 'loss_chunk_tokens', 'token_multiple')
WEIGHTS = ('*.safetensors', '*.bin')
_CHUNK = 1 << 22


def fill_in_pretrained(config: DictConfig, where: str) -> None:
    """Fill the ``model`` section with the shape of ``model.pretrained``, where that is set.

    Step encodings start at 0 in a model that did not think before, so that it starts with that model's logits.

    Raises:
        ValueError: one line that names the key: no such model, one that is no decoder of a known family, a tokenizer
            that it is too small for, or a key beside it that it has itself.
    """
    model = config.model
    if (name := model.get('pretrained')) is None:
        return
    if not isinstance(name, str):
        raise ValueError(f'{where}: model.pretrained: expected a folder or a hub id, got {name!r}')
    if config.get('load_path'):
        raise ValueError(
            f'{where}: load_path: its weights would replace those of model.pretrained ({name}); leave one of them out'
        )
    if model.get('init_device', 'cpu') != 'cpu':
        raise ValueError(
            f'{where}: model.init_device: {model.init_device} makes a model without weights, and model.pretrained has '
            'some; leave it out'
        )
    stored = stored_config(name, where)
    _check_tokenizer(config, stored, where)
    section: Any = OmegaConf.to_container(model)
    given = {key: value for key, value in section.items() if key in ModelOptions.keys() and value is not None}
    if stored.get('model_type') == 'itt':
        _keep_own(model, given, stored, where)
        return
    _check_family(stored, f'{where}: model.pretrained: {name}')
    for key in given:
        if key in SHAPE:
            raise ValueError(f'{where}: model.{key}: is that of model.pretrained ({name}); leave it out')
    depth = stored.get('num_hidden_layers', stored.get('n_layer'))
    with_where(f'{where}: model.', ModelOptions, **given, num_hidden_layers=depth)

    from itt_composer.model.pretrained_dense import initial_values, read_dense, shape_options  # takes seconds

    try:
        shape = shape_options(read_dense(find_pretrained(name, where)), name)
    except ValueError as error:
        raise ValueError(f'{where}: model.pretrained: {error}') from None
    model.update({**initial_values(model.get('thinking')), **given, **shape})


def stored_config(name: str, where: str) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Raises:
        ValueError: no such folder and no such model of the hub, no ``config.json``.
    """
    folder = find_pretrained(name, where)
    stored = read_json(folder / 'config.json')
    if stored is None:
        raise ValueError(
            f'{where}: model.pretrained: {name} has no config.json; set a folder that save_pretrained or itt export '
            'wrote'
        )
    return stored


def find_pretrained(name: str, where: str) -> Path:
    """The folder of a model; that of the hub's cache for a hub id, whose config and tokenizer are fetched."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(('/', '.', '~')) or name.count('/') != 1:
        raise ValueError(f'{where}: model.pretrained: no folder {name}; set a folder with a config.json, or a hub id')
    from huggingface_hub import hf_hub_download  # its import takes seconds, which a folder does not need

    try:
        folder = Path(hf_hub_download(name, 'config.json')).parent
    except Exception as error:  # of many kinds, all of which say why
        reason = ' '.join(str(error).split())[:150]
        raise ValueError(
            f'{where}: model.pretrained: no folder {name}, and the hub has no such model or cannot be reached '
            f'({reason}); set a folder, or another hub id'
        ) from None
    with contextlib.suppress(Exception):  # A model without one may have another kind, which transformers looks for.
        hf_hub_download(name, 'tokenizer.json')
    return folder


def weights_sha256(name: str) -> str:
    """SHA-256 of a folder's weights, or the revision of a hub id."""
    folder = find_pretrained(name, 'weights_sha256')
    if folder != Path(name):
        return folder.name
    files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    digest = hashlib.sha256()
    for path in files:
        with path.open('rb') as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _keep_own(model: DictConfig, given: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """A model of this package has its options already."""
    own = {key: value for key, value in current_names(stored).items() if key in ModelOptions.keys()}
    for key, value in given.items():
        if key not in COMPUTED and value != own.get(key, value):
            raise ValueError(
                f'{where}: model.{key}: got {value!r}, but {model.pretrained} was trained with {own[key]!r}; leave it '
                'out'
            )
    model.update({key: value for key, value in own.items() if key not in COMPUTED})


def _check_family(stored: Mapping[str, Any], where: str) -> None:
    kind, classes = stored.get('model_type'), ', '.join(stored.get('architectures') or [])
    decoder = not classes or classes.endswith(('ForCausalLM', 'LMHeadModel'))
    if stored.get('is_encoder_decoder') or (not decoder and kind not in FAMILIES):
        raise ValueError(f'{where}: expected a decoder with a language-modelling head, got {classes} ({kind})')
    if kind not in FAMILIES:
        raise ValueError(f'{where}: the family {kind!r} is not supported; set a model of one of {", ".join(FAMILIES)}')


def _check_tokenizer(config: DictConfig, stored: Mapping[str, Any], where: str) -> None:
    folder, vocabulary = find_tokenizer(config, where), stored.get('vocab_size')
    if folder is None or not isinstance(vocabulary, int):
        return
    size = vocabulary_size(read_tokenizer(folder))
    if vocabulary < size:
        raise ValueError(
            f'{where}: tokenizer.name: {config.tokenizer.name} has ids up to {size - 1}, but model.pretrained has a '
            f'vocabulary of {vocabulary}; set the tokenizer of the model'
        )


def find_tokenizer(config: DictConfig, where: str) -> Path | None:
    """The folder of the config's tokenizer where it has a ``tokenizer.json``; None where it has another kind."""
    name = config.tokenizer.get('name')
    if not isinstance(name, str):
        return None
    folder = Path(name)
    if not folder.is_dir() and name == config.model.get('pretrained'):
        folder = find_pretrained(name, where)
    return folder if (folder / 'tokenizer.json').is_file() else None
