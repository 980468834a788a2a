"""Dynamic batch loading: the domains' shares follow their losses (Sheared LLaMA, arXiv 2310.06694, Section 2.2).

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
    """UpdateWeight of Algorithm 1: w exp(max(gap, 0)), made to sum to 1.

    Args:
        w_K: the shares so far, float64.
        gap_K: evaluation loss less target, nats per token, float64.
    """
    delta_K = np.maximum(gap_K, 0.0)
    alpha_K = w_K * np.exp(delta_K - delta_K.max())  # a common factor, which the sum takes out, against overflow
    return alpha_K / alpha_K.sum()


def set_proportions(dataset: StreamingDataset, w_K: np.ndarray) -> None:
    """Have the dataset draw its streams in these shares from the next iterator on. The size of an epoch stays."""
    for stream, weight in zip(dataset.streams, w_K.tolist(), strict=True):
        # streaming derives all three from the one that is given, and refuses to be given more than one.
        del stream.repeat, stream.choose
        stream.proportion = weight
    Stream.apply_weights(dataset.streams, dataset.samples_per_stream, dataset.epoch_size, dataset.shuffle_seed)


class DynamicBatchLoading(Callback):
    """Sets the streams' shares anew at the start of every epoch of the train loader but the first.

    Args:
        targets: the loss that each domain should reach, in nats per token: a mapping, or a YAML or JSON file with one.

    Raises:
        ValueError: targets that are no losses; before the first batch, where they and the domains, the evaluation
            sets or the train loader do not go together.
    """

    def __init__(self, targets: Mapping[str, float] | str):
        self.targets = _read_targets(targets)
        self.weights: dict[str, float] | None = None
        """Each domain's share, in the order of the streams; None before training."""
        self._losses: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check that all is there, and take up the shares of a checkpoint."""
        dataset = _streams_of(state)
        domains = [Path(stream.local).name for stream in dataset.streams]
        self._check_domains(domains)
        _check_evaluation(state, domains)
        if self.weights is None:
            self.weights = {domain: float(s.proportion) for domain, s in zip(domains, dataset.streams, strict=True)}
        elif self.weights.keys() != set(domains):
            raise ValueError(
                f'{_KEY}: the checkpoint has shares for {", ".join(self.weights)}, and the streams are '
                f'{", ".join(domains)}; resume with the same domains'
            )
        self.weights = {domain: self.weights[domain] for domain in domains}
        set_proportions(dataset, np.array(list(self.weights.values())))
        if state.timestamp.epoch.value and not state.timestamp.batch_in_epoch.value:
            # Between two epochs Composer saves the start of the one before, whose draw would then come once more.
            place = dataset.state_dict(num_samples=0, from_beginning=True)
            dataset.load_state_dict(place | {'epoch': state.timestamp.epoch.value})

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep a domain's loss."""
        domain = str(state.dataloader_label).removeprefix('eval/')
        if self.weights is not None and domain in self.weights:
            self._losses[domain] = state.eval_metrics[str(state.dataloader_label)][_METRIC].compute().item()

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Update the shares by the last evaluation, if it is newer than they are, just before rows are drawn."""
        assert self.weights is not None, 'fit_start comes first'
        if state.timestamp.epoch.value and self._losses.keys() == self.weights.keys():
            gaps = {domain: self._losses[domain] - self.targets[domain] for domain in self.weights}
            self._losses = {}
            logger.log_metrics({f'{_KEY}/gap/{domain}': gap for domain, gap in gaps.items()})
            if all(map(math.isfinite, gaps.values())):
                w_K = update_weights(np.array(list(self.weights.values())), np.array(list(gaps.values())))
                # The ranks add the same losses, but a last bit that differs would have them draw different rows.
                shared = [w_K]
                dist.broadcast_object_list(shared)
                self.weights = dict(zip(self.weights, shared[0].tolist(), strict=True))
                set_proportions(_streams_of(state), shared[0])
            else:
                log.warning('%s: an evaluation loss is not finite; the shares stay as they are', _KEY)
        logger.log_metrics({f'{_KEY}/weight/{domain}': weight for domain, weight in self.weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """The shares, and losses that are still to be used.

        Lists of pairs: of a mapping a sharded checkpoint would store each key, and look for those that the callback has
        before it is loaded, which are none.
        """
        weights = None if self.weights is None else list(self.weights.items())
        return {'weights': weights, 'losses': list(self._losses.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up both; ``fit_start`` gives the shares to the streams."""
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
            raise ValueError(f'{_KEY}.targets: none for {", ".join(missing)}; each domain of the train loader has one')


def _read_targets(targets: Any) -> dict[str, float]:
    if isinstance(targets, str):
        path = Path(targets)
        if not path.is_file():
            raise ValueError(f'{_KEY}.targets: no file {path}; give one of domain: loss, or the mapping itself')
        try:
            targets = yaml.safe_load(path.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f'{_KEY}.targets: {path}: {" ".join(str(error).split())}') from None
    if not isinstance(targets, Mapping) or not targets:
        raise ValueError(f'{_KEY}.targets: {targets!r} is not a mapping of domain to loss, nor a file with one')
    for domain, loss in targets.items():
        if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not 0 < loss < math.inf:
            raise ValueError(f'{_KEY}.targets: {loss!r} for {domain} is not a loss in nats per token')
    return {str(domain): float(loss) for domain, loss in targets.items()}


def _streams_of(state: State) -> StreamingDataset:
    """The train loader's dataset; a ValueError where its shares cannot be changed in the course of this training."""
    loader = state.train_dataloader
    dataset = getattr(loader, 'dataset', None)
    if not isinstance(dataset, StreamingDataset):
        raise ValueError(
            f'{_KEY}: the train loader has no streams; it needs the loader "text" with a stream per domain'
        )
    if getattr(loader, 'num_workers', 0) and getattr(loader, 'persistent_workers', False):
        raise ValueError(
            f'{_KEY}: worker processes that stay from epoch to epoch never learn of new shares; '
            'set train_loader.persistent_workers=false'
        )
    epochs = training_length(state, TimeUnit.EPOCH)
    if epochs is not None and epochs <= 1:
        raise ValueError(
            f'{_KEY}: shares change where an epoch of the train loader starts, and this training has only one; set '
            'train_loader.dataset.epoch_size to the rows between two updates, and eval_interval=1ep'
        )
    return dataset


def _check_evaluation(state: State, domains: Sequence[str]) -> None:
    measured = {label.removeprefix('eval/') for label, metrics in state.eval_metrics.items() if _METRIC in metrics}
    if missing := [domain for domain in domains if domain not in measured]:
        raise ValueError(
            f'{_KEY}: no evaluation set with {_METRIC} for {", ".join(missing)}; a domain needs validation rows: '
            'convert with more VALIDATION_TOKENS, or leave it out of the training'
        )
