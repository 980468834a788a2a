"""Draw more training sequences from the domains whose evaluation loss is furthest above its target.

See README.md in this folder.
"""

from itt_composer.callbacks.dynamic_batch_loading.dynamic_batch_loading import (
    DynamicBatchLoading,
    set_proportions,
    update_weights,
)

__all__ = ['DynamicBatchLoading', 'set_proportions', 'update_weights']
