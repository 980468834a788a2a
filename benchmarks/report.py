"""How a benchmark of models shows its rows: a table on the terminal, and a CSV file where one is asked for."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table


def show(rows: list[dict[str, str]], title: str, out: Path | None) -> None:
    """Print the rows under their title, the device and PyTorch's version, and write them to ``out``.

    The file has the date, the title, the device and the versions in every row, so that files can be put together.
    """
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f'CPU, {torch.get_num_threads()} threads'
    table = Table(*rows[0], title=f'{title}; {device}, torch {torch.__version__}')
    for row in rows:
        table.add_row(*row.values())
    Console(width=130).print(table)
    if out is not None:
        about = {
            'date': datetime.date.today().isoformat(),
            'what': title,
            'device': device,
            'python': platform.python_version(),
            'torch': torch.__version__,
            'transformers': transformers.__version__,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, 'w', newline='') as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
