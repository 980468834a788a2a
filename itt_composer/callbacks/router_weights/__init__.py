"""Logs which weights the routers give and how many tokens they choose.

See README.md in this folder.
"""

from itt_composer.callbacks.router_weights.router_weights import (
    RoutedTokens,
    RouterWeights,
    plot_router_weights,
    summarise,
)

__all__ = ['RoutedTokens', 'RouterWeights', 'plot_router_weights', 'summarise']
