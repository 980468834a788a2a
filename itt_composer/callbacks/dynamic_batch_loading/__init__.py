"""Dynamic batch loading: domain weights follow the losses (Sheared LLaMA, arXiv 2310.06694, Section 2.2).

Shape suffixes: K domains, in the order of the dataset's streams.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from streaming import Stream, StreamingDataset

from itt_composer.checks import did_you_mean
from itt_composer.training.trainer_time import training_length

log = logging.getLogger(__name__)

_METRIC = 'LanguageCrossEntropy'
_KEY = 'dynamic_batch_loading'


def update_weights(w_K: np.ndarray, gap_K: np.ndarray) -> np.ndarray:
    """Return the new domain weights: w exp(max(gap, 0)), normalised to sum to 1 (UpdateWeight of Algorithm 1).

    Args:
        w_K: the weights before, float64.
        gap_K: evaluation loss minus target, nats per token, float64.
    """
    delta_K = np.maximum(gap_K, 0.0)
    alpha_K = w_K * np.exp(delta_K - delta_K.max())  # a common factor against overflow; the sum removes it
    return alpha_K / alpha_K.sum()


def set_proportions(dataset: StreamingDataset, w_K: np.ndarray) -> None:
    """Have the dataset draw its streams with these weights from the next iterator on; the epoch size stays."""
    for stream, weight in zip(dataset.streams, w_K.tolist(), strict=True):
        # streaming derives all three from the one that is set, and refuses more than one.
        del stream.repeat, stream.choose
        stream.proportion = weight
    Stream.apply_weights(dataset.streams, dataset.samples_per_stream, dataset.epoch_size, dataset.shuffle_seed)


class DynamicBatchLoading(Callback):
    """Update the weights of the streams at the start of every epoch of the train loader but the first.

    Args:
        targets: target loss of each domain, in nats per token: a mapping, or a YAML or JSON file with one.

    Raises:
        ValueError: a target is no loss; before the first batch, the targets do not fit the domains, the evaluation
            sets or the train loader.
    """

    def __init__(self, targets: Mapping[str, float] | str):
        self.targets = _read_targets(targets)
        self.weights: dict[str, float] | None = None
        """Weight of each domain, in the order of the streams; None before training."""
        self._losses: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check targets, domains and evaluation sets, and restore the weights of a checkpoint."""
        dataset = _streams_of(state)
        domains = [Path(stream.local).name for stream in dataset.streams]
        self._check_domains(domains)
        _check_evaluation(state, domains)
        if self.weights is None:
            self.weights = {domain: float(s.proportion) for domain, s in zip(domains, dataset.streams, strict=True)}
        elif self.weights.keys() != set(domains):
            raise ValueError(
                f'{_KEY}: expected the domains of the checkpoint, {", ".join(self.weights)}, got '
                f'{", ".join(domains)}; resume with the same domains'
            )
        self.weights = {domain: self.weights[domain] for domain in domains}
        set_proportions(dataset, np.array(list(self.weights.values())))
        if state.timestamp.epoch.value and not state.timestamp.batch_in_epoch.value:
            # Between two epochs Composer saves the start of the epoch before, which would then be drawn again.
            place = dataset.state_dict(num_samples=0, from_beginning=True)
            dataset.load_state_dict(place | {'epoch': state.timestamp.epoch.value})

    def eval_end(self, state: State, logger: Logger) -> None:
        """Store a domain's loss."""
        domain = str(state.dataloader_label).removeprefix('eval/')
        if self.weights is not None and domain in self.weights:
            self._losses[domain] = state.eval_metrics[str(state.dataloader_label)][_METRIC].compute().item()

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Update the weights by the last evaluation, if it is newer, just before sequences are drawn."""
        assert self.weights is not None, 'fit_start comes first'
        if state.timestamp.epoch.value and self._losses.keys() == self.weights.keys():
            gaps = {domain: self._losses[domain] - self.targets[domain] for domain in self.weights}
            self._losses = {}
            logger.log_metrics({f'{_KEY}/gap/{domain}': gap for domain, gap in gaps.items()})
            if all(map(math.isfinite, gaps.values())):
                w_K = update_weights(np.array(list(self.weights.values())), np.array(list(gaps.values())))
                # The ranks add the same losses, but a different last bit would make them draw different sequences.
                shared = [w_K]
                dist.broadcast_object_list(shared)
                self.weights = dict(zip(self.weights, shared[0].tolist(), strict=True))
                set_proportions(_streams_of(state), shared[0])
            else:
                log.warning('%s: an evaluation loss is not finite; the domain weights stay as they are', _KEY)
        logger.log_metrics({f'{_KEY}/weight/{domain}': weight for domain, weight in self.weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, and the losses of an evaluation that no update has used.

        Lists of pairs: a sharded checkpoint stores each key of a mapping, and loads only those that the callback has
        before, which are none.
        """
        weights = None if self.weights is None else list(self.weights.items())
        return {'weights': weights, 'losses': list(self._losses.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; ``fit_start`` sets the weights of the streams."""
        self.weights = None if state['weights'] is None else dict(state['weights'])
        self._losses = dict(state['losses'])

    def _check_domains(self, domains: Sequence[str]) -> None:
        for domain in self.targets:
            if domain not in domains:
                raise ValueError(
                    f'{_KEY}.targets: {domain!r} is not one of the domains of the train loader ({", ".join(domains)})'
                    f'{did_you_mean(domain, domains)}'
                )
        if missing := [domain for domain in domains if domain not in self.targets]:
            raise ValueError(
                f'{_KEY}.targets: missing for {", ".join(missing)}; set one for each domain of the train loader'
            )


def _read_targets(targets: Any) -> dict[str, float]:
    if isinstance(targets, str):
        path = Path(targets)
        if not path.is_file():
            raise ValueError(f'{_KEY}.targets: no file {path}; pass a file of domain: loss, or the mapping itself')
        try:
            targets = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f'{_KEY}.targets: {path}: {" ".join(str(error).split())}') from None
    if not isinstance(targets, Mapping) or not targets:
        raise ValueError(f'{_KEY}.targets: expected a mapping of domain to loss, or a file with one, got {targets!r}')
    for domain, loss in targets.items():
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not 0 < loss < math.inf:
            raise ValueError(f'{_KEY}.targets.{domain}: expected a loss in nats per token, got {loss!r}')
    return {str(domain): float(loss) for domain, loss in targets.items()}


def _streams_of(state: State) -> StreamingDataset:
    """Return the train loader's dataset, or raise a ValueError where its weights cannot change during the training."""
    loader = state.train_dataloader
    dataset = getattr(loader, 'dataset', None)
    if not isinstance(dataset, StreamingDataset):
        raise ValueError(f'{_KEY}: the train loader has no streams; use the loader "text" with a stream per domain')
    if getattr(loader, 'num_workers', 0) and getattr(loader, 'persistent_workers', False):
        raise ValueError(
            f'{_KEY}: persistent worker processes do not see new domain weights; '
            'set train_loader.persistent_workers=false'
        )
    epochs = training_length(state, TimeUnit.EPOCH)
    if epochs is not None and epochs <= 1:
        raise ValueError(
            f'{_KEY}: domain weights change at the start of an epoch, and this training has only one; set '
            'train_loader.dataset.epoch_size to the sequences between two updates, and eval_interval=1ep'
        )
    return dataset


def _check_evaluation(state: State, domains: Sequence[str]) -> None:
    measured = {label.removeprefix('eval/') for label, metrics in state.eval_metrics.items() if _METRIC in metrics}
    if missing := [domain for domain in domains if domain not in measured]:
        raise ValueError(
            f'{_KEY}: no evaluation set with {_METRIC} for {", ".join(missing)}; convert with more '
            '--validation-tokens, or leave the domain out of the training'
        )
