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
    events = EventAccumulator(str(runs / 'tensorboard' / run_file.stem), size_guidance={'scalars': 0, 'images': 0})
    events.Reload()
    domains = _curves(events, 'metrics/eval/', '/LanguageCrossEntropy')
    if not domains:
        raise ValueError(f'{runs / "tensorboard" / run_file.stem}: no evaluation loss; was the run stopped early?')
    manifest = json.loads((data / 'manifest.json').read_text())
    rows = {domain: manifest['domains'][domain]['validation']['rows'] for domain in domains}
    validation_loss = _mean_curve(domains, rows)
    top_k = _curves(events, 'causal_gap/eval/', '/cross_entropy_top_k')
    return Result(
        name=name,
        parameters=parameters(decoder).total,
        paper_gflops=paper_flops(decoder, sequence_length) / 1e9,
        exact_gflops=exact_flops(decoder, sequence_length).total / 1e9,
        train_loss=[(event.step, event.value) for event in events.Scalars('loss/train/total')],
        validation_loss=validation_loss,
        domain_losses={domain: curve[max(curve)] for domain, curve in domains.items()},
        top_k_loss=_mean_curve(top_k, rows)[-1][1] if top_k else None,
        tokens_per_second=statistics.median(event.value for event in events.Scalars('throughput/tokens_per_sec')),
        train_seconds=3600 * events.Scalars('time/train')[-1].value,
        pictures={tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()['images']},
    )


def _curves(events: EventAccumulator, prefix: str, suffix: str) -> dict[str, dict[int, float]]:
    """Domain to its curve (batch to value), of the scalars named ``<prefix><domain><suffix>``."""
    return {
        tag.removeprefix(prefix).removesuffix(suffix): {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()['scalars']
        if tag.startswith(prefix) and tag.endswith(suffix)
    }


def _mean_curve(domains: dict[str, dict[int, float]], rows: dict[str, int]) -> list[tuple[int, float]]:
    """Mean over the domains, each weighted by its rows, at the batches that all have."""
    steps = sorted(set.intersection(*(set(curve) for curve in domains.values())))
    total = sum(rows[domain] for domain in domains)
    return [(step, sum(rows[domain] * curve[step] for domain, curve in domains.items()) / total) for step in steps]


def write_csv(results: list[Result], path: Path) -> None:
    """The comparison table as a file."""
    rows = [result.row() for result in results]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
