"""The hot functions of an extra step, in PyTorch, and where they run the kernels of itt_composer.kernels."""

from itt_composer.ops.attention import attention_with_weights, causal_attention
from itt_composer.ops.swiglu import swiglu
from itt_composer.ops.tokens import add_to_tokens, add_weighted, gather_tokens, last_tokens, replace_tokens

__all__ = [
    'add_to_tokens',
    'add_weighted',
    'attention_with_weights',
    'causal_attention',
    'gather_tokens',
    'last_tokens',
    'replace_tokens',
    'swiglu',
]
