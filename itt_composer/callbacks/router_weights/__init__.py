"""Log gate values of the routers and the fraction of tokens they route.

See README.md in this folder.
"""

from itt_composer.callbacks.router_weights.router_weights import RouterWeights, summarise

__all__ = ['RouterWeights', 'summarise']
