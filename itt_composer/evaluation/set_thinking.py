"""More or less thinking in foundry's evaluation, as ``model.set_thinking`` has it."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from itt_composer.model import ITTForCausalLM


class SetThinking(Callback):
    """Sets how much a loaded model thinks before it is evaluated; for ``eval.py``, not for training.

    Args:
        token_ratios: share of tokens of each extra step; 0 removes a step. Default: the model's.
        selection: routing rule. Default: the model's for evaluation.

    Raises:
        ValueError: in training, where it would change what is trained; or as ``set_thinking`` does.
    """

    def __init__(self, token_ratios: list[float] | str | None = None, selection: str | None = None):
        self.token_ratios = token_ratios
        self.selection = selection

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse."""
        raise ValueError('set_thinking: for evaluation only; in training set model.token_ratios and model.selection')

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """Set."""
        for module in state.model.modules():
            if isinstance(module, ITTForCausalLM):
                module.set_thinking(token_ratios=self.token_ratios, selection=self.selection)
