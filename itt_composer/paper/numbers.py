"""The paper's numbers that a report shows beside its own, from ``numbers.csv``."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path


@cache
def paper_numbers() -> dict[str, dict[tuple[str, str], tuple[float, str]]]:
    """Study of the paper's to (arm, metric) to the value and where it stands."""
    studies: dict[str, dict[tuple[str, str], tuple[float, str]]] = {}
    with open(Path(__file__).with_name('numbers.csv'), newline='') as file:
        for row in csv.DictReader(file):
            studies.setdefault(row['study'], {})[row['arm'], row['metric']] = float(row['value']), row['source']
    return studies
