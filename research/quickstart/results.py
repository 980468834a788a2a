"""The result of a run, read from its TensorBoard files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from itt_composer.analysis.tensorboard import RunLogs, mean_curve
from itt_composer.atomic import write_text
from itt_composer.config.run_file import resolve_model
from itt_composer.flops import Decoder, exact_flops, parameters


@dataclass
class Result:
    """One trained model.

    ``train_loss`` and ``validation_loss`` are curves, (batches trained, nats per token); ``domain_losses`` the last
    evaluation of each domain; ``top_k_loss`` the last evaluation loss under top-k routing (None for a model without
    routers); ``pictures`` the last figure of each name that the callbacks logged, as PNG.
    """

    name: str
    parameters: int
    exact_gflops: float
    train_loss: list[tuple[int, float]]
    validation_loss: list[tuple[int, float]]
    domain_losses: dict[str, float]
    top_k_loss: float | None
    pictures: dict[str, bytes]

    def row(self) -> dict[str, str]:
        """Return the row of the table: exact GFLOPs of a sequence, losses in nats per token."""
        return {
            'model': self.name,
            'loss, threshold': f'{self.validation_loss[-1][1]:.4f}',
            'loss, top-k': '-' if self.top_k_loss is None else f'{self.top_k_loss:.4f}',
            'GFLOPs': f'{self.exact_gflops:.2f}',
            'parameters': f'{self.parameters:,}',
        }


def read_result(name: str, run_file: Path, data: Path, runs: Path) -> Result:
    """Collect a finished run; its evaluation loss is the mean over the validation sequences of all domains.

    Raises:
        ValueError: the run has no evaluation loss.
    """
    model, S = resolve_model(run_file, [f'variables.data={data}'])
    decoder = Decoder.from_model_config(model)
    folder = runs / 'tensorboard' / run_file.stem
    logs = RunLogs(folder)
    domains = logs.domain_losses()
    if not domains:
        raise ValueError(f'{folder}: no evaluation loss; was the run stopped early?')
    manifest = json.loads((data / 'manifest.json').read_text())
    sequences = {domain: manifest['domains'][domain]['validation']['rows'] for domain in domains}
    top_k = logs.training_selection_losses()
    return Result(
        name=name,
        parameters=parameters(decoder).total,
        exact_gflops=exact_flops(decoder, S).total / 1e9,
        train_loss=list(logs.curve('loss/train/total').items()),
        validation_loss=list(mean_curve(domains, sequences).items()),
        domain_losses={domain: curve[max(curve)] for domain, curve in domains.items()},
        top_k_loss=list(mean_curve(top_k, sequences).values())[-1] if top_k else None,
        pictures=logs.last_pictures(),
    )


def write_csv(results: list[Result], path: Path) -> None:
    """Write the table as a file."""
    write_text(pd.DataFrame([result.row() for result in results]).to_csv(index=False), path)
