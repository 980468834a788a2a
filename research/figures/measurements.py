"""The measurements behind the figures: the inputs that each needs, and the tables that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from itt_composer.analysis import router_weights
from itt_composer.analysis.routing_records import token_thinking
from itt_composer.analysis.step_encodings import step_encoding_table, step_encodings
from itt_composer.atomic import write_text
from itt_composer.evaluation import sweep
from itt_composer.evaluation.held_out import HeldOut, held_out_rows, rows_by_domain
from itt_composer.evaluation.tokens import describe, passage_of_ids
from itt_composer.export.load import as_ours, as_routed, load
from itt_composer.model import ITTForCausalLM
from itt_composer.ratios import ratios_key
from research.figures import accuracy, difficulty, easy_and_hard, logit_lens
from research.figures.over_training import read_training

PARAGRAPH_TOKENS = 160


@dataclass
class Inputs:
    """Inputs of the user; models and sequences are read when first used.

    Raises:
        ValueError: from any of the properties, for an input of the wrong kind.
    """

    model: Path | None = None
    dense: Path | None = None
    data: Path | None = None
    aqua: Path | None = None
    tensorboard: Path | None = None
    scores: Path | None = None
    sequences: int = 64
    samples: int = 254
    selection: str = 'threshold'
    _loaded: dict[Path, tuple[PreTrainedModel, PreTrainedTokenizerFast]] = field(default_factory=dict)

    def given(self) -> set[str]:
        """Return the names of the inputs that are set."""
        names = ('model', 'dense', 'data', 'aqua', 'tensorboard', 'scores')
        return {name for name in names if getattr(self, name) is not None}

    def path(self, name: str) -> Path:
        """Return one of the paths; a measurement uses those that it needs, which are set."""
        path = getattr(self, name)
        assert path is not None
        return path

    def loaded(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Return ``model`` or ``dense`` and its tokenizer."""
        path = self.path(name)
        if path not in self._loaded:
            self._loaded[path] = load(path)
        return self._loaded[path]

    @cached_property
    def routed_model(self) -> ITTForCausalLM:
        """``model`` with the selection that is set."""
        model = as_routed(self.loaded('model')[0], self.path('model'))
        model.set_thinking(selection=self.selection)
        return model

    @cached_property
    def dense_model(self) -> ITTForCausalLM:
        """``dense``, with the vocabulary of ``model``."""
        dense = as_ours(self.loaded('dense')[0], self.path('dense'))
        if dense.config.vocab_size != self.routed_model.config.vocab_size:
            raise ValueError(
                f'{self.dense}: expected the vocabulary size of {self.model}, '
                f'{self.routed_model.config.vocab_size}, got {dense.config.vocab_size}; use one tokenizer'
            )
        return dense

    @cached_property
    def held_out(self) -> Tensor:
        """Held-out sequences, the domains in turn, [sequences, S]."""
        return held_out_rows(self.path('data'), self.sequences, self.routed_model.config)

    @cached_property
    def domains(self) -> dict[str, Tensor]:
        """At most ``sequences`` held-out sequences of each domain."""
        return rows_by_domain(self.path('data'), self.sequences, self.routed_model.config)

    def described(self) -> str:
        """Return a description of the model."""
        return describe(self.routed_model, self.path('model'))

    def described_with_rule(self) -> str:
        """Return the description with the selection."""
        return f'{self.described()} Selection: {self.selection}.'


@dataclass(frozen=True)
class Measurement:
    """One measurement."""

    tables: tuple[str, ...]
    needs: tuple[str, ...]
    """Fields of :class:`Inputs`."""
    measure: Callable[[Inputs], tuple[list[pd.DataFrame], str]]
    """Returns the tables, and a description of what was measured."""


def _accuracy(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    table = accuracy.table(inputs.scores)
    selections = sorted(set(table.selection[table.source == accuracy.HERE]) - {'none'})
    return [table], f'Here: {inputs.scores}; selection: {", ".join(selections)}.' if inputs.scores else ''


def _step_encodings(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    phi = step_encodings(inputs.routed_model)
    if not phi:
        raise ValueError(f'{inputs.model}: the model has no step encodings (step_encoding: false)')
    return [step_encoding_table(phi)], inputs.described()


def _router_weights(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    thinking = token_thinking(inputs.routed_model, inputs.held_out)
    tokens = {
        layer_step: router_weights.RoutedTokens(
            thinking.gate_MNS[m].ravel(), thinking.routed_MNS[m].ravel(), float(thinking.threshold_M[m])
        )
        for m, layer_step in enumerate(thinking.layer_steps)
    }
    return [router_weights.histogram(tokens)], f'{inputs.described_with_rule()} {_tokens(inputs.held_out)}'


def _over_training(source: str) -> Callable[[Inputs], tuple[list[pd.DataFrame], str]]:
    def measure(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
        about = f'The run {inputs.path("tensorboard").name}; training batches, selection of the training.'
        return [read_training(inputs.path('tensorboard'), source)], about

    return measure


def _passages(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    model, tokenizer = inputs.routed_model, inputs.loaded('model')[1]
    # A domain of few documents may have no held-out one; its paragraph is then training text.
    trained_on = rows_by_domain(inputs.path('data'), 1, model.config, 'train')
    domains = {f'{domain} (training text)': rows for domain, rows in trained_on.items() if domain not in inputs.domains}
    tables = []
    for title, rows_NS in (inputs.domains | domains).items():
        ids = paragraph(rows_NS, model.config.bos_token_id, PARAGRAPH_TOKENS)
        tables.append(passage_of_ids(model, tokenizer, title, ids).table().assign(rule=inputs.selection))
    return [pd.concat(tables)], inputs.described()


def paragraph(rows_NS: Tensor, bos: int | None, length: int) -> list[int]:
    """Return the start of the first document with ``length`` tokens in its sequence, or of the first sequence."""
    for row in rows_NS.tolist():
        starts = [i for i, token in enumerate(row) if token == bos]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=False):
            if end - start >= length:
                return row[start : start + length]
    return rows_NS[0, :length].tolist()


def _logit_lens(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    models = {
        'dense baseline': inputs.dense_model,
        f'ITT x{inputs.routed_model.config.thinking_steps + 1}': inputs.routed_model,
    }
    each = -(-inputs.sequences // len(inputs.domains))
    domains = {domain: rows_NS[:each] for domain, rows_NS in inputs.domains.items()}
    about = f'{inputs.described_with_rule()} {_tokens(torch.cat(list(domains.values())))}'
    return [logit_lens.measure(models, domains)], about


def _difficulty(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    tables = difficulty.measure(inputs.routed_model, inputs.dense_model, inputs.domains)
    return list(tables), f'{inputs.described_with_rule()} {_tokens(torch.cat(list(inputs.domains.values())))}'


def _easy_and_hard(name: str) -> Callable[[Inputs], tuple[list[pd.DataFrame], str]]:
    def measure(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
        model, tokenizer = inputs.loaded(name)
        table = easy_and_hard.measure(model, tokenizer, inputs.path('aqua'), test_samples=inputs.samples)
        path = inputs.path(name)
        samples = table.groupby('group')['samples'].first()
        return [table], (
            f'{"/".join(path.parts[-2:])} of {model.num_parameters() / 1e6:.4g}M parameters, trained on 100 samples of '
            f'AQuA; of {samples.sum()} test samples {samples["easy"]} are easy (answered correctly).'
        )

    return measure


def _elastic(inputs: Inputs) -> tuple[list[pd.DataFrame], str]:
    model, held_out = inputs.routed_model, inputs.held_out
    trained = list(model.config.token_ratios)
    about = f'{inputs.described()} {_tokens(held_out[: len(held_out) // 2])}'
    settings = sweep.measure(model, HeldOut.of_rows(held_out), sweep.settings_for(len(trained), trained, []))
    return [pd.DataFrame(map(asdict, settings)).assign(trained=ratios_key(trained))], about


def _tokens(rows_NS: Tensor) -> str:
    return f'{rows_NS.numel():,} held-out tokens in sequences of {rows_NS.shape[1]}.'


# The fast ones first; the last one changes the thresholds of the model.
MEASUREMENTS = (
    Measurement(('accuracy',), (), _accuracy),  # without SCORES the paper's alone
    Measurement(('step_encodings',), ('model',), _step_encodings),
    Measurement(('step_encodings_over_training',), ('tensorboard',), _over_training('step_encoding')),
    Measurement(('router_weights_over_training',), ('tensorboard',), _over_training('router')),
    Measurement(('router_weights',), ('model', 'data'), _router_weights),
    Measurement(('token_pages',), ('model', 'data'), _passages),
    Measurement(('logit_lens',), ('model', 'dense', 'data'), _logit_lens),
    Measurement(('depth_and_loss', 'depth_and_loss_by_step'), ('model', 'dense', 'data'), _difficulty),
    Measurement(('easy_and_hard',), ('model', 'aqua'), _easy_and_hard('model')),
    Measurement(('easy_and_hard_dense',), ('dense', 'aqua'), _easy_and_hard('dense')),
    Measurement(('elastic',), ('model', 'data'), _elastic),
)


def read_table(file: Path) -> pd.DataFrame:
    """Read a table of a measurement; ratios such as 0.9 stay text."""
    return pd.read_csv(file, dtype={'ratios': str, 'trained': str, 'piece': str, 'title': str})


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a table with six digits."""
    write_text(table.to_csv(index=False, float_format='%.6g'), file)
