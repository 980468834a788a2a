"""Count how often a batch of the real trainer waits for the device, by the line that asks.

    python benchmarks/host_syncs.py [--batches 20] [--selection threshold] [--out results.csv]

An operation that gives the host a value (``item``, ``tolist``, ``nonzero``, a boolean index, a copy from a GPU) makes
it wait. The operations are counted without a GPU, too, where the attention kernels are others: ``ops.cpu_attention`` is
not used on a GPU. Blocks are not compiled, because compilation hides the operations.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from report import check_results, show
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_step import NAME, run_overrides, train

SYNCS = {'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::_unique2'}
PACKAGES = ('itt_composer.', 'composer.', 'llmfoundry.', 'torch.optim.', 'torchmetrics.', 'streaming.')
TOLIST = torch.Tensor.tolist
WARM = 4
"""Optimizer steps before the first counted one."""


class HostSyncs(TorchDispatchMode):
    """Counts the operations that give the host a value, by the innermost line of the packages."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, tensors = function._schema.name, [x for x in args if isinstance(x, torch.Tensor)]
        indices = args[1] if name.startswith('aten::index') and len(args) > 1 and isinstance(args[1], list) else []
        masked = any(isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in indices)
        fetched = isinstance(result, torch.Tensor) and result.is_cpu and any(x.is_cuda for x in tensors)
        if name in SYNCS or masked or fetched:
            self.found[asker()] += 1
        return result

    def tolist(self, tensor: torch.Tensor) -> Any:
        """Count ``tensor.tolist()``, which is no operation."""
        self.found[asker()] += 1
        return TOLIST(tensor)


def asker() -> str:
    """Return the innermost line of one of the packages on the stack, as ``module:line function``."""
    frame = sys._getframe()
    while frame := frame.f_back:
        module = frame.f_globals.get('__name__', '')
        if module.startswith(PACKAGES):
            return f'{module}:{frame.f_lineno} {frame.f_code.co_name}'
    return 'elsewhere'


def main(
    batches: Annotated[int, typer.Option(help='Batches of the run.', min=WARM + 2)] = 20,
    selection: Annotated[str, typer.Option(help='Routing in training: top_k, top_p or threshold.')] = 'top_k',
    out: Annotated[Path | None, typer.Option(help='Also write the rows to this CSV file.')] = None,
) -> None:
    """Count and print the table: waits per batch, from one optimizer step to the next."""
    check_results(out)
    syncs, at_step = HostSyncs(), []
    register_optimizer_step_post_hook(lambda *_: at_step.append(syncs.found.copy()))
    with tempfile.TemporaryDirectory() as folder:
        overrides = run_overrides(Path(folder), batches)
        overrides += ['run_name=syncs', 'model.compile_blocks=false', f'model.selection={selection}']
        with syncs, patch.object(torch.Tensor, 'tolist', lambda tensor: syncs.tolist(tensor)):
            train(overrides)
    counted = at_step[-1] - at_step[WARM - 1]
    rows = [
        {'asked by': line, 'waits per batch': f'{count / (len(at_step) - WARM):.2f}'}
        for line, count in counted.most_common()
    ]
    show(rows, f'Waits for the device, {NAME}, {selection}, {len(at_step) - WARM} batches', out)


if __name__ == '__main__':
    typer.run(main)
