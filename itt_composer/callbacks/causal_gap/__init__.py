"""Log the evaluation loss under the training selection beside that of threshold routing.

See README.md in this folder.
"""

from itt_composer.callbacks.causal_gap.causal_gap import CausalGap

__all__ = ['CausalGap']
