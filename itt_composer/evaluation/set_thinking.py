"""Other token ratios and another selection in foundry's evaluation."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from itt_composer.model import ITTForCausalLM


class SetThinking(Callback):
    """Set the token ratios and the selection of a loaded model before it is evaluated; for ``eval.py`` only.

    Args:
        token_ratios: fraction of tokens routed to each extra step; 0 removes a step. Default: the model's.
        selection: ``threshold``, ``top_k`` or ``top_p``. Default: the model's for evaluation.

    Raises:
        ValueError: in training, where it would change what is trained; or as ``set_thinking`` does.
    """

    def __init__(self, token_ratios: list[float] | str | None = None, selection: str | None = None):
        self.token_ratios = token_ratios
        self.selection = selection

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse training."""
        raise ValueError('set_thinking: for evaluation only; in training set model.token_ratios and model.selection')

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """Set both."""
        for module in state.model.modules():
            if isinstance(module, ITTForCausalLM):
                module.set_thinking(token_ratios=self.token_ratios, selection=self.selection)
