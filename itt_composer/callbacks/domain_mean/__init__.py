"""Logs the unweighted mean of the domains' evaluation losses.

See README.md in this folder.
"""

from itt_composer.callbacks.domain_mean.domain_mean import DomainMean

__all__ = ['DomainMean']
