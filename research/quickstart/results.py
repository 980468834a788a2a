"""What a run left behind, read from its TensorBoard files."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from itt_composer.atomic import write_text
from itt_composer.config.run_file import resolve_model
from itt_composer.flops import Decoder, exact_flops, paper_flops, parameters
from itt_composer.training.tensorboard import RunLogs, mean_curve


@dataclass
class Result:
    """One trained model.

    ``train_loss`` and ``validation_loss`` are curves, (batches trained, nats per token); ``domain_losses`` the last
    evaluation of each domain; ``top_k_loss`` the last evaluation loss under the rule that ITT trains with, which looks
    ahead (None for a model without routers); ``pictures`` the last of each that the callbacks drew, as PNG.
    """

    name: str
    parameters: int
    paper_gflops: float
    exact_gflops: float
    train_loss: list[tuple[int, float]]
    validation_loss: list[tuple[int, float]]
    domain_losses: dict[str, float]
    top_k_loss: float | None
    tokens_per_second: float
    train_seconds: float
    pictures: dict[str, bytes]

    def row(self) -> dict[str, str]:
        """The row of the comparison table: exact GFLOPs of a sequence, nats per token, seconds of training."""
        return {
            'model': self.name,
            'parameters': f'{self.parameters:,}',
            'GFLOPs': f'{self.exact_gflops:.2f}',
            'loss': f'{self.validation_loss[-1][1]:.4f}',
            'loss, top-k': '-' if self.top_k_loss is None else f'{self.top_k_loss:.4f}',
            'tokens/s': f'{self.tokens_per_second:,.0f}',
            'seconds': f'{self.train_seconds:.0f}',
        }


def read_result(name: str, run_file: Path, data: Path, runs: Path) -> Result:
    """Collect a finished run.

    The evaluation loss is the mean over the domains, each weighted by its validation rows.

    Raises:
        ValueError: the run left no evaluation loss.
    """
    model, sequence_length = resolve_model(run_file, [f'variables.data={data}'])
    decoder = Decoder.from_model_config(model)
    logs = RunLogs(runs / 'tensorboard' / run_file.stem)
    domains = logs.domain_losses()
    if not domains:
        raise ValueError(f'{runs / "tensorboard" / run_file.stem}: no evaluation loss; was the run stopped early?')
    manifest = json.loads((data / 'manifest.json').read_text())
    rows = {domain: manifest['domains'][domain]['validation']['rows'] for domain in domains}
    top_k = logs.domain_losses_ahead()
    return Result(
        name=name,
        parameters=parameters(decoder).total,
        paper_gflops=paper_flops(decoder, sequence_length) / 1e9,
        exact_gflops=exact_flops(decoder, sequence_length).total / 1e9,
        train_loss=list(logs.curve('loss/train/total').items()),
        validation_loss=list(mean_curve(domains, rows).items()),
        domain_losses={domain: curve[max(curve)] for domain, curve in domains.items()},
        top_k_loss=list(mean_curve(top_k, rows).values())[-1] if top_k else None,
        tokens_per_second=statistics.median(logs.curve('throughput/tokens_per_sec').values()),
        train_seconds=3600 * list(logs.curve('time/train').values())[-1],
        pictures=logs.last_pictures(),
    )


def write_csv(results: list[Result], path: Path) -> None:
    """The comparison table as a file."""
    write_text(pd.DataFrame([result.row() for result in results]).to_csv(index=False), path)
