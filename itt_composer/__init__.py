"""Inner Thinking Transformer (arXiv 2502.13842) for MosaicML Composer and LLM-Foundry."""

from __future__ import annotations

from typing import Any

__version__ = '0.2.0'

__all__ = ['ITTConfig', 'ITTForCausalLM', '__version__']


def __getattr__(name: str) -> Any:
    # Lazy, so that `itt ls` and `itt flops` need no torch.
    if name in ('ITTConfig', 'ITTForCausalLM'):
        from itt_composer import model

        return getattr(model, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
