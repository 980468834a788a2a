"""Log the nuclear norm of every layer's attention gradients.

See README.md in this folder.
"""

from itt_composer.callbacks.gradient_nuclear_norm.gradient_nuclear_norm import (
    GradientNuclearNorm,
    gradient_nuclear_norms,
    plot_gradient_nuclear_norms,
)

__all__ = ['GradientNuclearNorm', 'gradient_nuclear_norms', 'plot_gradient_nuclear_norms']
