"""Tokenize the examples of a fine-tuning at every start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod


@contextmanager
def renew_examples() -> Iterator[None]:
    """Let the first rank of each node write the cache of examples again; the others wait for it and read it.

    The cache knows a preprocessing function by its name, so one that has changed would not be run. Without a cache
    (``datasets.disable_caching``) each rank would tokenize all examples.
    """
    from datasets import Dataset

    before = {name: getattr(Dataset, name) for name in ('map', 'filter')}
    if os.environ.get('LOCAL_RANK', '0') == '0':
        for name, method in before.items():
            setattr(Dataset, name, partialmethod(method, load_from_cache_file=False))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Dataset, name, method)
