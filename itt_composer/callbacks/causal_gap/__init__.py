"""Log the evaluation loss under threshold routing and under the training selection, and their difference."""

from __future__ import annotations

from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from llmfoundry.metrics import LanguageCrossEntropy
from torch.nn.parallel import DistributedDataParallel

from itt_composer.model import routing_state


class CausalGap(Callback):
    """Evaluate every language-modelling batch once more under the training selection, and log the difference.

    Raises:
        ValueError: at INIT, the model routes no tokens, or evaluates with the selection of its training.
    """

    def __init__(self) -> None:
        self._non_causal = LanguageCrossEntropy()
        self._causal = LanguageCrossEntropy()
        self._evaluated = False

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model whose evaluation has no other selection to compare with."""
        routing = routing_state(state.model)
        if routing is None or routing.selection in (None, routing.evaluation_selection):
            raise ValueError(
                'causal_gap: training and evaluation have the same selection; set thinking: itt, token_routing: true '
                'and an evaluation_selection other than selection, or remove the callback'
            )
        for metric in (self._non_causal, self._causal):
            state.device.module_to_device(metric)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Reset both losses for a new evaluation set."""
        self._non_causal.reset()
        self._causal.reset()
        self._evaluated = False

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Run the batch again; the model still has its shifted labels."""
        if 'mode' in state.batch:  # A task of foundry's; its score is not a loss over the text.
            return
        self._evaluated = True
        model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        assert isinstance(model, HuggingFaceModel)
        routing = routing_state(state.model)
        assert routing is not None
        with (
            routing.temporarily(evaluation_selection=routing.selection),
            get_precision_context(state.precision, state.precision_config),
        ):
            non_causal_BSV = model(state.batch)['logits']
            # As Composer does, update under autocast: sums are float32, without it those of bfloat16 are rounded.
            self._causal.update(state.outputs, model.labels)
            self._non_causal.update(non_causal_BSV, model.labels)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log both losses and the gap, in nats per token."""
        # Not by the tokens counted: a rank may have none, and all must take part in the sums.
        if not self._evaluated:
            return
        routing = routing_state(state.model)
        assert routing is not None
        causal, non_causal = self._causal.compute().item(), self._non_causal.compute().item()
        label = f'causal_gap/{state.dataloader_label}'
        logger.log_metrics(
            {
                f'{label}/cross_entropy_{routing.evaluation_selection}': causal,
                f'{label}/cross_entropy_{routing.selection}': non_causal,
                f'{label}/gap': causal - non_causal,
            }
        )
