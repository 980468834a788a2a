"""What a run left in its TensorBoard files, ``<runs>/tensorboard/<run_name>``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = dict[int, float]
"""Batches trained to a value."""


class RunLogs:
    """The scalars and pictures of one run. After a resume, the last value of a batch counts."""

    def __init__(self, folder: Path):
        self._events = EventAccumulator(str(folder), size_guidance={'scalars': 0, 'images': 0})
        self._events.Reload()

    def curve(self, tag: str) -> Curve:
        """One scalar's curve; empty where the run did not log it."""
        if tag not in self._events.Tags()['scalars']:
            return {}
        return {event.step: event.value for event in self._events.Scalars(tag)}

    def curves(self, prefix: str, suffix: str = '') -> dict[str, Curve]:
        """``<name>`` to its curve, of the scalars ``<prefix><name><suffix>``, by name."""
        return {
            tag.removeprefix(prefix).removesuffix(suffix): self.curve(tag)
            for tag in sorted(self._events.Tags()['scalars'])
            if tag.startswith(prefix) and tag.endswith(suffix)
        }

    def last_pictures(self) -> dict[str, bytes]:
        """The last of each picture, as PNG."""
        return {tag: self._events.Images(tag)[-1].encoded_image_string for tag in self._events.Tags()['images']}

    def domain_losses(self) -> dict[str, Curve]:
        """Return each evaluation set's loss under ``evaluation_selection``, in nats per token."""
        return self.curves('metrics/eval/', '/LanguageCrossEntropy')

    def training_selection_losses(self, selection: str = 'top_k') -> dict[str, Curve]:
        """Return the same under the training selection (callback ``causal_gap``); empty for a run without it."""
        return self.curves('causal_gap/eval/', f'/cross_entropy_{selection}')


def mean_curve(domains: Mapping[str, Curve], rows: Mapping[str, int]) -> Curve:
    """Mean over the domains, each weighted by its sequences, at the batches that all have."""
    steps = sorted(set.intersection(*(set(curve) for curve in domains.values())))
    total = sum(rows[domain] for domain in domains)
    return {step: sum(rows[domain] * curve[step] for domain, curve in domains.items()) / total for step in steps}
