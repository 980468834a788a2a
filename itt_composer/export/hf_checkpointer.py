"""Foundry's ``hf_checkpointer`` callback, whose folders of our models stand alone as exported ones do.

Registered under foundry's own name. For any other model it is foundry's callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger
from llmfoundry.callbacks import HuggingFaceCheckpointer
from transformers import PretrainedConfig

from itt_composer.export.checkpoint import progress_of
from itt_composer.export.folder import save_card, servable
from itt_composer.export.model_card import RunFigures
from itt_composer.export.tokenizer import name_inputs
from itt_composer.model import ITTForCausalLM, thinking_layers


class ITTHuggingFaceCheckpointer(HuggingFaceCheckpointer):
    """Saves Hugging Face folders during training; the arguments are foundry's.

    A dense baseline is saved as ordinary LLaMA, another with its modelling file.
    """

    # The config that the model being saved trains with; None for a model of another package.
    _trained: PretrainedConfig | None = None

    def transform_model_and_tokenizer(self, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        """The model as it is to be saved."""
        self._trained = model.config if isinstance(model, ITTForCausalLM) else None
        if self._trained is None:
            return super().transform_model_and_tokenizer(model, tokenizer)
        for i, layer in thinking_layers(model).items():
            # The base class has rounded every tensor to the precision of the parameters.
            layer.threshold_T, layer.threshold_updates = self._thresholds[i]
        return servable(model), tokenizer

    def _get_hf_model(self, state: State) -> Any:
        self._thresholds = {}
        for i, layer in thinking_layers(state.model).items():
            layer.commit_thresholds()
            self._thresholds[i] = layer.threshold_T.cpu().clone(), layer.threshold_updates.cpu().clone()
        return super()._get_hf_model(state)

    def save_additional_contents(self, state: State, logger: Logger, save_dir: str) -> None:
        """The card."""
        super().save_additional_contents(state, logger, save_dir)
        if self._trained is not None:
            progress = progress_of(state.timestamp.state_dict())
            save_card(self._trained, Path(save_dir), RunFigures(state.run_name, progress))
            name_inputs(Path(save_dir))
