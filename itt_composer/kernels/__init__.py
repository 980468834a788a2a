"""Triton kernels for the hot functions of :mod:`itt_composer.ops`, which calls them where they run."""

from itt_composer.kernels.attention import routed_attention
from itt_composer.kernels.tokens import add_weighted, gather_tokens, replace_tokens

__all__ = ['add_weighted', 'gather_tokens', 'replace_tokens', 'routed_attention']
