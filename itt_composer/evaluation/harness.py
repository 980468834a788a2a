"""Our models in lm-eval, under the name ``itt``: any number of thinking steps, chosen at test time.

lm_eval --model itt --model_args pretrained=<dir>,token_ratios=0.7/0.7/0.9,selection=threshold --tasks ...
"""

from __future__ import annotations

import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoConfig

from itt_composer.evaluation.scoring import log_likelihoods
from itt_composer.export.check import check_exported
from itt_composer.model import ITTConfig, ITTForCausalLM, thinking_layers, thinking_setting
from itt_composer.options import parse_ratios

log = logging.getLogger(__name__)

# Of one batch, padding included: little enough for a CPU's memory, and enough to fill a GPU.
BATCH_TOKENS = {'cpu': 8_192, 'cuda': 65_536}


@register_model('itt')
class ITTLM(HFLM):
    """lm-eval's Hugging Face model, with the routing rule and the thinking steps as arguments.

    Questions are batched by length, as many as fit ``batch_tokens``, and the context of each is run once for all of
    its answers. Under a rule that looks ahead every answer is run with its context, and only rows of one length share
    a batch, since padding would be among the tokens to choose from.

    Args:
        pretrained: an exported folder.
        token_ratios: share of tokens of each extra step, ``0.7/0.7/0.9``; 0 removes a step. Default: the model's.
        selection: routing rule. Default: the model's own for evaluation.
        batch_tokens: tokens of one batch, padding included.
        dtype: default bfloat16 on a GPU, float32 on a CPU.
        device: default a GPU where there is one.
        batch_size: lm-eval's; only ``auto`` and its default of 1, which both mean batches by ``batch_tokens``.
        max_length: longest context; default the model's, which it may not exceed.
        **options: of lm-eval's ``hf`` model.

    Raises:
        ValueError: no whole exported folder there, or thinking options that the model does not have.
    """

    def __init__(
        self,
        pretrained: str,
        token_ratios: str | float | None = None,
        selection: str | None = None,
        batch_tokens: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 'auto',
        max_length: int | None = None,
        **options: Any,
    ):
        check_exported(Path(pretrained))
        ratios = None if token_ratios is None else parse_ratios(str(token_ratios))
        check_thinking(Path(pretrained), ratios, selection)
        if batch_size not in (None, 1, '1', 'auto'):
            raise ValueError(
                f'batch_size: {batch_size}, but batches are made by tokens; give batch_tokens in model_args'
            )
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        dtype = dtype or ('bfloat16' if device.startswith('cuda') else 'float32')
        # lm-eval's own way of scoring would sum log-probabilities in the model's dtype: bfloat16 ties answers.
        options.setdefault('softmax_dtype', 'float32')
        super().__init__(pretrained, device=device, dtype=dtype, batch_size='auto', **options)
        longest = self.model.config.max_position_embeddings
        if max_length is not None and max_length > longest:
            raise ValueError(f'max_length: {max_length} is longer than the context of {longest} that the model has')
        self._max_length = max_length or longest
        self._batch_tokens = batch_tokens or BATCH_TOKENS['cuda' if device.startswith('cuda') else 'cpu']
        self._rows: list[int] = []
        if ratios is not None or selection is not None:
            self.model.set_thinking(ratios, selection)

    @property
    def selection(self) -> str | None:
        """The routing rule in force; None for a model without routers."""
        return self.model.selection if isinstance(self.model, ITTForCausalLM) else None

    @property
    def token_ratios(self) -> list[float]:
        """Share of tokens of each extra step as it is run; empty for a plain model."""
        layers = thinking_layers(self.model)
        return list(next(iter(layers.values())).ratios_T) if layers else list(getattr(self.config, 'token_ratios', []))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts in its results, with the rule that chose the tokens."""
        return {**super().get_model_info(), 'selection': self.selection}

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """Score ``requests``, (texts, context, answer) each; what is too long for the model loses its beginning."""
        fitting, cut = [], 0
        for texts, context, answer in requests:
            room = self.max_length + 1 - len(answer)
            if room < 1:
                raise ValueError(f'an answer of {len(answer)} tokens does not fit the context of {self.max_length}')
            cut += len(context) > room
            fitting.append((texts, context[-room:], answer))
        if cut:
            log.warning(
                f'{cut} of {len(requests)} requests are longer than the context of {self.max_length} and lose their '
                'beginning'
            )
        if self._looks_ahead:
            # No cache: a later token may change an earlier one. So lm-eval's own way, in batches of one length.
            return super()._loglikelihood_tokens(fitting, disable_tqdm, override_bs)
        autocast = torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None)
        with autocast, tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc='requests') as bar:

            def on_done(number: int, likelihood: float, greedy: bool) -> None:
                if fitting[number][0] is not None:
                    self.cache_hook.add_partial('loglikelihood', fitting[number][0], (likelihood, greedy))
                bar.update()

            pairs = [(context, answer) for _, context, answer in fitting]
            return log_likelihoods(self.model, pairs, self._batch_tokens, self.max_length, on_done)

    @property
    def _looks_ahead(self) -> bool:
        return self.selection in ('top_k', 'top_p')

    def _batch_scheduler(self, pos: int, n_reordered_requests: list) -> int:
        """Rows of the batch that the request at ``pos`` is in; lm-eval asks for each, the longest request first."""
        if pos == 0:
            lengths = [len(context) + len(continuation) - 1 for _, context, continuation in n_reordered_requests]
            self._rows = rows_per_batch(lengths, self._batch_tokens)
        return self._rows[pos]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Rows of the longest context there is."""
        return 1 if self._looks_ahead else max(1, self._batch_tokens // self.max_length)


def check_thinking(folder: Path, token_ratios: list[float] | str | None, selection: str | None) -> None:
    """See from an exported folder's config alone that its model can be run so; None stands for the model's own.

    Raises:
        ValueError: a plain model, or options that ``set_thinking`` would refuse.
    """
    if token_ratios is None and selection is None:
        return
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, ITTConfig):
        raise ValueError(f'token_ratios, selection: given, but {folder} is a plain model, which does not think')
    thinking_setting(config, token_ratios, selection)


def rows_per_batch(lengths: list[int], tokens: int) -> list[int]:
    """For each request, longest first, how many share its batch: those of its length that fit ``tokens``."""
    rows: list[int] = []
    for length, run in groupby(lengths):
        count, size = len(list(run)), max(1, tokens // length)
        rows += [size] * (count - count % size) + [count % size] * (count % size)
    return rows
