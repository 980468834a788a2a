"""The evaluation loss under both routing rules, and their difference."""

from __future__ import annotations

from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from llmfoundry.metrics import LanguageCrossEntropy
from torch.nn.parallel import DistributedDataParallel

from itt_composer.model import routing_state


class CausalGap(Callback):
    """Evaluates every language-modelling batch once more under the rule that training uses, and logs the difference.

    Raises:
        ValueError: as soon as the model is seen, where both rules are the same or nothing is routed.
    """

    def __init__(self) -> None:
        self._looks_ahead = LanguageCrossEntropy()
        self._causal = LanguageCrossEntropy()

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model whose evaluation has no other rule to be compared with."""
        routing = routing_state(state.model)
        if routing is None or routing.selection in (None, routing.evaluation_selection):
            raise ValueError(
                'causal_gap: training and evaluation choose tokens by the same rule; it needs thinking: itt, '
                'token_routing: true, and an evaluation_selection other than selection'
            )
        for metric in (self._looks_ahead, self._causal):
            state.device.module_to_device(metric)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Begin a data set."""
        self._looks_ahead.reset()
        self._causal.reset()

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Run the batch again; its labels are those that the model has just set apart and shifted."""
        if 'mode' in state.batch:  # A task of foundry's, whose score is not a loss over the text.
            return
        model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        assert isinstance(model, HuggingFaceModel)
        routing = routing_state(state.model)
        assert routing is not None
        with (
            routing.temporarily(evaluation_selection=routing.selection),
            get_precision_context(state.precision, state.precision_config),
        ):
            ahead_BSV = model(state.batch)['logits']
        # As Composer updates its metrics: under autocast sums are float32, without it those of bfloat16 are rounded.
        with get_precision_context(state.precision, state.precision_config):
            self._causal.update(state.outputs, model.labels)
            self._looks_ahead.update(ahead_BSV, model.labels)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log both losses and the gap, in nats per token."""
        if not self._causal.total_items:
            return
        routing = routing_state(state.model)
        assert routing is not None
        causal, ahead = self._causal.compute().item(), self._looks_ahead.compute().item()
        label = f'causal_gap/{state.dataloader_label}'
        logger.log_metrics(
            {
                f'{label}/cross_entropy_{routing.evaluation_selection}': causal,
                f'{label}/cross_entropy_{routing.selection}': ahead,
                f'{label}/gap': causal - ahead,
            }
        )
