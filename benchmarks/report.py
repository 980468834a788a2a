"""How a benchmark of models shows its rows: a table on the terminal, and a CSV file where one is asked for."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def show(rows: list[dict[str, str]], title: str, out: Path | None) -> None:
    """Print the rows under their title, the device and PyTorch's version, and write them to ``out``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    table = Table(*rows[0], title=f'{title}; {device}, torch {torch.__version__}')
    for row in rows:
        table.add_row(*row.values())
    Console(width=130).print(table)
    if out is not None:
        with open(out, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
