"""Logs which weights the routers give and how many tokens they choose.

See README.md in this folder.
"""

from itt_composer.callbacks.router_weights.router_weights import RouterWeights, summarise

__all__ = ['RouterWeights', 'summarise']
