"""Nuclear norm of the attention gradients on easy and on hard samples (Section 2, Figure 2).

As in the paper, the model is first trained on 100 samples of AQuA. Samples of the test set that it then answers
correctly are easy, the others hard. The gradient of each sample is taken separately.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from itt_composer.analysis.attention_gradients import (
    LayerProjection,
    attention_gradients,
    attention_projections,
    nuclear_norm,
)
from itt_composer.analysis.figure_style import line_style, tidy
from research.figures.aqua import TEST, TRAIN, Sample, answers_correctly, read_samples
from research.figures.bootstrap import ratio_of_sums

TARGETS = ('letter', 'letter and solution')
# Our recipe: the paper says no more than 100 samples.
LEARNING_RATE, EPOCHS, BATCH = 2e-5, 3, 4


def train(model: PreTrainedModel, samples: list[Sample]) -> None:
    """Train the model in place on letter and solution: AdamW, constant learning rate, three epochs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(epoch)).tolist()
        for first in track(range(0, len(order), BATCH), f'training on AQuA, epoch {epoch + 1}'):
            batch = [samples[i] for i in order[first : first + BATCH]]
            for sample in batch:
                (_loss(model, sample, with_solution=True) / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def norms_of_sample(model: PreTrainedModel, sample: Sample, with_solution: bool) -> dict[LayerProjection, float]:
    """Return the nuclear norm of each attention matrix' gradient for one sample's loss."""
    model.zero_grad()
    _loss(model, sample, with_solution).backward()
    norms = {key: nuclear_norm(gradient) for key, gradient in attention_gradients(model)}
    model.zero_grad()
    return norms


def _loss(model: PreTrainedModel, sample: Sample, with_solution: bool) -> torch.Tensor:
    """Return the mean loss over the labelled tokens."""
    labels = sample.labels(with_solution).to(model.device)
    return model(input_ids=sample.tokens.to(model.device), labels=labels).loss


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    aqua: Path,
    train_samples: int = 100,
    test_samples: int = 254,
) -> pd.DataFrame:
    """Train a copy of the model on AQuA, and measure it on easy and on hard samples.

    Args:
        model: any causal LM with LLaMA's or GPT-2's module names; it is not changed.
        tokenizer: the model's.
        aqua: the folder with AQuA's ``aqua_dev.jsonl``, which is trained on, and ``aqua_test.jsonl``.
        train_samples: 0 takes the model as it is.
        test_samples: how many are measured, at most.

    Returns:
        A row for each of the two losses, each group, layer and projection: ``target``, ``group``, ``layer``,
        ``projection``, ``samples``, and the mean ``norm`` with ``low`` and ``high``, a 95 % interval by bootstrap over
        samples.

    Raises:
        ValueError: AQuA is missing, the attention is not found by name, or all samples are in one group.
    """
    if not attention_projections(model):
        raise ValueError(f'{type(model).__name__}: no attention projections found by the names of LLaMA or GPT-2')
    context = model.config.max_position_embeddings
    test = read_samples(aqua / TEST, test_samples, tokenizer, context)
    if train_samples:
        model = copy.deepcopy(model)
        train(model, read_samples(aqua / TRAIN, train_samples, tokenizer, context))
    groups = ['easy' if answers_correctly(model, sample) else 'hard' for sample in track(test, 'answering')]
    for group in ('easy', 'hard'):
        if groups.count(group) < 2:
            raise ValueError(f'{groups.count(group)} of {len(groups)} samples are {group}; both groups need at least 2')
    norms: dict[tuple, list[float]] = {}
    for sample, group in track(list(zip(test, groups, strict=True)), 'gradient nuclear norms'):
        for target in TARGETS:
            for (layer, name), norm in norms_of_sample(model, sample, target == TARGETS[1]).items():
                norms.setdefault((target, group, layer, name), []).append(norm)
    rows = [
        (*key, len(values), *ratio_of_sums(np.stack([values, np.ones(len(values))], axis=-1)))
        for key, values in norms.items()
    ]
    columns = ['target', 'group', 'layer', 'projection', 'samples', 'norm', 'low', 'high']
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4], ignore_index=True)


def plot(table: pd.DataFrame) -> Figure:
    """Plot the norms over the layers, easy and hard: a column for each projection, a row for each of the two losses.

    Args:
        table: the result of :func:`measure`.
    """
    names = [f'{letter}_proj' for letter in 'qkvo']
    figure = Figure(figsize=(11, 5), dpi=140, layout='constrained')
    axes = figure.subplots(len(TARGETS), len(names), sharex=True, squeeze=False)
    for (target, name), panel in table.groupby(['target', 'projection']):
        axis = axes[TARGETS.index(target), names.index(name)]
        for i, (group, rows) in enumerate(panel.groupby('group'), start=1):
            style = line_style(i)
            axis.fill_between(rows['layer'], rows['low'], rows['high'], color=style['color'], alpha=0.2, linewidth=0)
            axis.plot(rows['layer'], rows['norm'], label=f'{group} (n = {rows["samples"].iloc[0]})', **style)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted(set(panel['layer'])))
        tidy(axis)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    for axis, target in zip(axes[:, 0], TARGETS, strict=True):
        axis.set_ylabel(f'nuclear norm of the gradient,\nloss of the {target}', fontsize=8)
    figure.supxlabel('layer (from 0)', fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc='outside upper right', ncols=2, fontsize=8, frameon=False
    )
    return figure
