"""Logs the evaluation loss under the training rule beside the causal one.

See README.md in this folder.
"""

from itt_composer.callbacks.causal_gap.causal_gap import CausalGap

__all__ = ['CausalGap']
