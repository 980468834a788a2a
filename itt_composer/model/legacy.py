"""Names of weights that earlier versions saved, read for one release."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

_OLD_BLOCK = re.compile(r'(\blayers\.\d+\.)f\.')


def current_weight_name(name: str) -> str:
    """``model.layers.0.f.mlp...`` as it is called now, ``model.layers.0.block.mlp...``; other names as they are."""
    renamed = _OLD_BLOCK.sub(r'\1block.', name)
    if renamed != name:
        _warn()
    return renamed


def rename_loaded_weights(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of ``load_state_dict``, for a layer whose ``block`` was called ``f``."""
    for name in [name for name in weights if name.startswith(f'{prefix}f.')]:
        weights[f'{prefix}block.{name[len(prefix) + 2 :]}'] = weights.pop(name)
        _warn()


def _warn() -> None:
    # One text, which Python shows once. FutureWarning, because Python hides a DeprecationWarning from users.
    warnings.warn(
        'the weights have the old name `f` for the block of a thinking layer; save the model again, the next release '
        'will not read the old name',
        FutureWarning,
        stacklevel=3,
    )
