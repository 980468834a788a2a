"""The hot functions of a thinking step, in plain PyTorch; faster kernels take their place behind the same names."""

from itt_composer.ops.attention import causal_attention
from itt_composer.ops.tokens import add_to_tokens, gather_tokens, replace_tokens

__all__ = ['add_to_tokens', 'causal_attention', 'gather_tokens', 'replace_tokens']
