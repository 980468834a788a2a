"""The mean over domains, each with the same weight."""

from __future__ import annotations

from collections.abc import Sequence

from composer.core import Callback, State
from composer.loggers import Logger

METRIC = 'LanguageCrossEntropy'


class DomainMean(Callback):
    """Log the unweighted mean of the evaluation losses of ``domains`` after each evaluation, in nats per token.

    Args:
        domains: labels of the evaluation sets. In a training config they are filled in from the data.
    """

    def __init__(self, domains: Sequence[str] = ()):
        self.domains = list(domains)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Log the mean, if all domains were evaluated."""
        metrics = [state.eval_metrics.get(f'eval/{domain}', {}).get(METRIC) for domain in self.domains]
        losses = [metric.compute().item() for metric in metrics if metric is not None]
        if losses and len(losses) == len(self.domains):
            logger.log_metrics({f'metrics/eval_domain_mean/{METRIC}': sum(losses) / len(losses)})
