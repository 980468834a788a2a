"""Models of this package in lm-eval, under the name ``itt``, with token ratios and selection as arguments.

itt-lm-eval --model itt --model_args pretrained=<dir>,token_ratios=0.7/0.7/0.9,selection=threshold --tasks ...
"""

from __future__ import annotations

import hashlib
import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from itt_composer.evaluation.scoring import log_likelihoods
from itt_composer.export.check import check_exported, read_folder_config
from itt_composer.model import ITTConfig, ITTForCausalLM, routing_state, thinking_setting
from itt_composer.ratios import parse_ratios

log = logging.getLogger(__name__)

# Of one batch, padding included: fits a CPU's memory, and fills a GPU.
BATCH_TOKENS = {'cpu': 8_192, 'cuda': 65_536}


@register_model('itt')
class ITTLM(HFLM):
    """lm-eval's Hugging Face model, with selection and token ratios as arguments.

    Questions are batched by length, as many as fit ``batch_tokens``, and the context of each is run once for all of
    its answers. With non-causal routing every answer is run with its context, and only sequences of one length share a
    batch, because padding would be among the tokens that may be routed.

    Args:
        pretrained: an exported folder.
        token_ratios: fraction of tokens routed to each extra step, ``0.7/0.7/0.9``; 0 removes a step. Default: the
            model's.
        selection: ``threshold``, ``top_k`` or ``top_p``. Default: the model's for evaluation.
        batch_tokens: tokens of one batch, padding included.
        dtype: default bfloat16 on a GPU, float32 on a CPU.
        device: default a GPU where there is one.
        batch_size: lm-eval's; only ``auto`` and its default of 1, which both mean batches by ``batch_tokens``.
        max_length: longest context; default the model's, which it may not exceed.
        **options: of lm-eval's ``hf`` model.

    Raises:
        ValueError: no complete exported folder there, or options that the model does not have.
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
            raise ValueError(f'batch_size: expected auto, got {batch_size}; set batch_tokens in model_args')
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        dtype = dtype or ('bfloat16' if device.startswith('cuda') else 'float32')
        # lm-eval's own way of scoring would sum log-probabilities in the model's dtype: bfloat16 ties answers.
        options.setdefault('softmax_dtype', 'float32')
        super().__init__(pretrained, device=device, dtype=dtype, batch_size='auto', **options)
        longest = self.model.config.max_position_embeddings
        if max_length is not None and max_length > longest:
            raise ValueError(f"max_length: expected at most {longest}, the model's context, got {max_length}")
        self._max_length = max_length or longest
        self._batch_tokens = batch_tokens or BATCH_TOKENS['cuda' if device.startswith('cuda') else 'cpu']
        self._rows: list[int] = []
        if ratios is not None or selection is not None:
            self.model.set_thinking(ratios, selection)
        files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(pretrained).iterdir())
        self._scored_as = [
            *(str(Path(pretrained).resolve()), files, self.selection, self.token_ratios),
            *(self._max_length, dtype, sorted(options.items())),
        ]

    @property
    def selection(self) -> str | None:
        """The active selection; None for a model without routers."""
        return self.model.selection if isinstance(self.model, ITTForCausalLM) else None

    @property
    def token_ratios(self) -> list[float]:
        """Fraction of tokens routed to each extra step, as run; empty for a dense baseline."""
        state = routing_state(self.model)
        return list(state.ratios_T(False)) if state else list(getattr(self.config, 'token_ratios', []))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts in its results, with the selection and the token ratios."""
        return {**super().get_model_info(), 'selection': self.selection, 'token_ratios': self.token_ratios}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep results in a table of the cache that belongs to this model, its ratios and its selection.

        lm-eval's ``--use_cache`` finds a result by its request alone, so another setting's would come back.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            name = hashlib.sha256(json.dumps(self._scored_as, default=str).encode()).hexdigest()[:16]
            cache_hook.dbdict.tablename = f'itt_{name}'
            cache_hook.dbdict.conn.execute(
                f'CREATE TABLE IF NOT EXISTS "itt_{name}" (key TEXT PRIMARY KEY, value BLOB)'
            )
            cache_hook.dbdict.conn.commit()

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        """Score ``requests``, (texts, context, answer) each; one that is too long for the model loses its beginning."""
        fitting, cut = [], 0
        for texts, context, answer in requests:
            room = self.max_length + 1 - len(answer)
            if room < 1:
                raise ValueError(
                    f'max_length: an answer of {len(answer)} tokens does not fit the context of {self.max_length}'
                )
            cut += len(context) > room
            fitting.append((texts, context[-room:], answer))
        if cut:
            log.warning(
                f'{cut} of {len(requests)} requests are longer than the context of {self.max_length} and lose their '
                'beginning'
            )
        if self._non_causal:
            # No cache: a later token may change an earlier one. So as lm-eval does, in batches of one length.
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
    def _non_causal(self) -> bool:
        return self.selection in ('top_k', 'top_p')

    def _batch_scheduler(self, pos: int, n_reordered_requests: list) -> int:
        """Size of the batch that the request at ``pos`` is in; lm-eval asks for each, the longest request first."""
        if pos == 0:
            lengths = [len(context) + len(continuation) - 1 for _, context, continuation in n_reordered_requests]
            self._rows = rows_per_batch(lengths, self._batch_tokens)
        return self._rows[pos]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Size of a batch of the longest contexts."""
        return 1 if self._non_causal else max(1, self._batch_tokens // self.max_length)


def check_thinking(folder: Path, token_ratios: list[float] | str | None, selection: str | None) -> None:
    """Check token ratios and selection against an exported folder's config alone; None stands for the model's own.

    Raises:
        ValueError: a dense baseline, or options that ``set_thinking`` would refuse.
    """
    if token_ratios is None and selection is None:
        return
    config = read_folder_config(folder)
    if not isinstance(config, ITTConfig):
        raise ValueError(
            f'token_ratios, selection: {folder} is a dense baseline, which has no extra steps; leave both out'
        )
    thinking_setting(config, token_ratios, selection)


def rows_per_batch(lengths: list[int], tokens: int) -> list[int]:
    """Return for each request, longest first, the size of its batch: requests of its length that fit ``tokens``."""
    rows: list[int] = []
    for length, run in groupby(lengths):
        count, size = len(list(run)), max(1, tokens // length)
        rows += [size] * (count - count % size) + [count % size] * (count % size)
    return rows
