"""What a run left behind, read from its TensorBoard files."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itt_composer.flops import Decoder, exact_flops, paper_flops, parameters
from itt_composer.run_file import resolve_model

CROSS_ENTROPY = 'LanguageCrossEntropy'


@dataclass
class Result:
    """One trained model.

    ``train_loss`` and ``validation_loss`` are curves, (batches trained, nats per token); ``domain_losses`` the last
    evaluation of each domain; ``pictures`` the last of each that the callbacks drew, as PNG.
    """

    name: str
    parameters: int
    paper_gflops: float
    exact_gflops: float
    train_loss: list[tuple[int, float]]
    validation_loss: list[tuple[int, float]]
    domain_losses: dict[str, float]
    tokens_per_second: float
    train_seconds: float
    pictures: dict[str, bytes]

    def row(self) -> dict[str, str]:
        """The row of the comparison table."""
        return {
            'model': self.name,
            'parameters': f'{self.parameters:,}',
            'exact GFLOPs a sequence': f'{self.exact_gflops:.2f}',
            'evaluation loss': f'{self.validation_loss[-1][1]:.4f}',
            'tokens/s': f'{self.tokens_per_second:,.0f}',
            'training, s': f'{self.train_seconds:.0f}',
        }


def read_result(name: str, run_file: Path, overrides: list[str], runs: Path) -> Result:
    """Collect a finished run.

    The evaluation loss is the mean over the domains, each weighted by its validation rows.

    Raises:
        ValueError: the run left no evaluation loss.
    """
    model, sequence_length = resolve_model(run_file, overrides)
    decoder = Decoder.from_model_config(model)
    events = EventAccumulator(str(runs / 'tensorboard' / run_file.stem), size_guidance={'scalars': 0, 'images': 0})
    events.Reload()
    tags = events.Tags()
    domains = {
        tag.split('/')[2]: {event.step: event.value for event in events.Scalars(tag)}
        for tag in tags['scalars']
        if tag.startswith('metrics/eval/') and tag.endswith(CROSS_ENTROPY)
    }
    if not domains:
        raise ValueError(f'{runs / "tensorboard" / run_file.stem}: no evaluation loss; was the run stopped early?')
    manifest = json.loads((Path(_data(overrides)) / 'manifest.json').read_text())
    rows = {domain: manifest['domains'][domain]['validation']['rows'] for domain in domains}
    steps = sorted(set.intersection(*(set(curve) for curve in domains.values())))
    validation_loss = [
        (step, sum(rows[d] * curve[step] for d, curve in domains.items()) / sum(rows.values())) for step in steps
    ]
    return Result(
        name=name,
        parameters=parameters(decoder).total,
        paper_gflops=paper_flops(decoder, sequence_length) / 1e9,
        exact_gflops=exact_flops(decoder, sequence_length).total / 1e9,
        train_loss=[(event.step, event.value) for event in events.Scalars('loss/train/total')],
        validation_loss=validation_loss,
        domain_losses={domain: curve[steps[-1]] for domain, curve in domains.items()},
        tokens_per_second=statistics.median(event.value for event in events.Scalars('throughput/tokens_per_sec')),
        train_seconds=3600 * events.Scalars('time/train')[-1].value,
        pictures={tag: events.Images(tag)[-1].encoded_image_string for tag in tags['images']},
    )


def write_csv(results: list[Result], path: Path) -> None:
    """The comparison table as a file."""
    rows = [result.row() for result in results]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _data(overrides: list[str]) -> str:
    return next(value for key, value in (item.split('=', 1) for item in overrides) if key == 'variables.data')
