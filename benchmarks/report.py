"""How a benchmark of models shows its rows: a table on the terminal, and a CSV file where one is asked for."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.table import Table

from itt_composer.atomic import check_writable, write_text
from itt_composer.one_line import one_line_errors


def check_results(out: Path | None) -> None:
    """Stop where the results could not be written, before the work."""
    with one_line_errors('benchmark'):
        if out is not None:
            check_writable(out)


def show(rows: list[dict[str, str]], title: str, out: Path | None) -> None:
    """Print the rows under their title, the device and PyTorch's version, and write them to ``out``."""
    table = Table(*rows[0], title=f'{title}; {device_name()}, torch {torch.__version__}')
    for row in rows:
        table.add_row(*row.values())
    Console(width=130).print(table)
    if out is not None:
        write(rows, title, out)


def write(rows: list[dict[str, str]], title: str, out: Path) -> None:
    """Write the rows as CSV, each with the date, title, device and versions, so that files can be put together."""
    about = {
        'date': datetime.date.today().isoformat(),
        'what': title,
        'device': device_name(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'transformers': transformers.__version__,
    }
    write_text(pd.DataFrame({**row, **about} for row in rows).to_csv(index=False), out)


def device_name() -> str:
    """Return the name of the GPU, or what the CPU has of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
