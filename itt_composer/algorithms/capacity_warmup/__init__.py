"""Grow the capacity of each step over the first part of the training (getCapacity, Algorithm 1).

See README.md in this folder.
"""

from itt_composer.algorithms.capacity_warmup.capacity_warmup import CapacityWarmup, apply_capacity, get_capacity

__all__ = ['CapacityWarmup', 'apply_capacity', 'get_capacity']
