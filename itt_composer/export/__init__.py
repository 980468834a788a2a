"""Composer checkpoints as Hugging Face folders."""

from typing import Any

__all__ = ['export']


def __getattr__(name: str) -> Any:
    # Lazy, so that `itt export --help` needs no torch.
    if name == 'export':
        from itt_composer.export.folder import export

        return export
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
