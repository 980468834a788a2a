"""What the engines for clusters share: a unit's work in a process of its own, and how often it is begun again."""

from __future__ import annotations

import os

from data_prep.tokens.document_tokenizer import load_document_tokenizer
from data_prep.work_item import Recipe, Unit, UnitRecord, convert_unit

POLL_SECONDS = 0.5
# How often a task is begun again after its process or machine died.
RETRIES = 3
# One process is one core: the tokenizer's own threads would only get in the other processes' way.
ENVIRONMENT = {'TOKENIZERS_PARALLELISM': 'false'}


def work(recipe: Recipe, unit: Unit) -> UnitRecord:
    """Convert a unit; the tokenizer is loaded once for each process."""
    tokenizer = load_document_tokenizer(recipe.tokenizer_folder)
    return convert_unit(recipe, unit, tokenizer, lambda read_bytes, tokens: None)


def check_workers(variable: str, workers: int | None) -> None:
    """Raise a ValueError for a number of workers where an environment variable names a cluster that is there."""
    if variable in os.environ and workers is not None:
        raise ValueError(f'WORKERS: the cluster that {variable} names has as many as it has; leave WORKERS out')


def not_installed(engine: str, package: str) -> ValueError:
    """What to tell a user without an engine's package."""
    return ValueError(f"ENGINE: {engine} is not installed; pip install '{package}', or take ENGINE=local")


def gave_up(engine: str, error: Exception) -> RuntimeError:
    """What to tell a user whose cluster could not finish a task."""
    return RuntimeError(
        f'{engine} gave up on a task ({type(error).__name__}); the same command goes on from the last unit'
    )
