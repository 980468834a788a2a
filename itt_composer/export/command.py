"""``itt export``: a Composer checkpoint as a Hugging Face folder."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from itt_composer.one_line import one_line_errors


class Dtype(str, enum.Enum):
    """What the parameters may be saved as."""

    float32 = 'float32'
    bfloat16 = 'bfloat16'
    float16 = 'float16'


def main(
    checkpoint: Annotated[
        Path, typer.Option(help='.pt file, sharded folder, run’s folder of checkpoints, or Hugging Face folder.')
    ],
    out: Annotated[Path, typer.Option(help='Folder to write.')],
    dtype: Annotated[Dtype | None, typer.Option(help='Default: the dtype of the checkpoint.')] = None,
    tokenizer: Annotated[str | None, typer.Option(help='Folder or hub id. Default: that of the checkpoint.')] = None,
    tensorboard: Annotated[Path | None, typer.Option(help='TensorBoard folder of the run, for the model card.')] = None,
    overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace an existing folder.')] = False,
) -> None:
    """Write safetensors, config, tokenizer, generation config, modelling file and model card."""
    import torch

    from itt_composer.export.folder import export

    with one_line_errors('export'):
        export(checkpoint, out, getattr(torch, dtype.value) if dtype else None, tokenizer, tensorboard, overwrite)
    console = Console()
    for file in sorted(out.iterdir()):
        console.print(f'{file.stat().st_size:>14,}  {file}', highlight=False)
