"""Composer checkpoints as Hugging Face folders."""

from itt_composer.export.folder import export

__all__ = ['export']
