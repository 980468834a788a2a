"""One run: train a variant, evaluate it, and measure what its routers do.

Runs of one seed have the same batches, and the same initial weights where their models have the same layers.

N sequences of S tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from itt_composer.flops import Decoder, exact_flops
from itt_composer.model import ITTConfig, ITTForCausalLM
from research.state_tracking.measures import elastic_rows, evaluate, routing_rows, text
from research.state_tracking.study import ELASTIC, LOSSES, ROUTING, Run, Study
from research.state_tracking.task import sequences

TRAINING_SEED, EVALUATION_SEED, CALIBRATION_SEED = 1_000_000, 1, 2
"""Of the sequences; a run's own seed is added to the first."""
CURVE_POINTS = 5
"""Evaluations of a run, evenly spaced; the last one is at the end."""


def run_rows(study: Study, run: Run) -> dict[str, list[dict[str, Any]]]:
    """Train one run and return its rows of each table."""
    started = time.process_time()
    settings, options, batches = study.settings, study.model_options(run.variant), study.batches(run.stage)
    S, N = options['max_position_embeddings'], settings['evaluation']['sequences']
    torch.manual_seed(run.seed)
    model = ITTForCausalLM(ITTConfig(**options))
    evaluation = sequences(N, S, torch.Generator().manual_seed(EVALUATION_SEED))
    curve, routing = [], []
    for batch in train(model, run, batches, settings['training']):
        if batch * CURVE_POINTS % batches < CURVE_POINTS:
            losses_S, accuracy_S, records = evaluate(model, *evaluation)
            curve.append(losses_S.mean().item())
            routing.append(routing_rows(records, evaluation[0]))
    names = {'stage': run.stage, 'variant': run.variant, 'seed': run.seed, 'learning_rate': run.learning_rate}
    rows: dict[str, list[dict[str, Any]]] = {LOSSES: [], ELASTIC: [], ROUTING: []}
    if run.stage == 'main':
        for row, *curves in zip(routing[-1], *routing, strict=True):
            over_time = {f'{key}_curve': text([then[key] for then in curves], 3) for key in ('fraction', 'threshold')}
            rows[ROUTING].append({**names, **row, **over_time})
        calibration_NS, _ = sequences(N, S, torch.Generator().manual_seed(CALIBRATION_SEED))
        rows[ELASTIC] = [{**names, **row} for row in elastic_rows(model, *evaluation, calibration_NS)]
    result = {
        'settings': study.digest(run.variant),
        'tokens': batches * settings['training']['batch_size'] * S,
        'flops': exact_flops(Decoder.from_model_config(options), S).total,
        'loss': curve[-1] if math.isfinite(curve[-1]) else math.inf,
        'loss_by_position': text(losses_S.tolist(), 4),
        'accuracy_by_position': text(accuracy_S.tolist(), 3),
        'loss_curve': text(curve, 4),
        'cpu_seconds': round(time.process_time() - started),
    }
    rows[LOSSES] = [{**names, **result}]
    return rows


def train(model: ITTForCausalLM, run: Run, batches: int, settings: dict[str, Any]) -> Iterator[int]:
    """Train the model, and yield the number of batches after each: linear warm-up, then a cosine to a tenth."""
    assert run.learning_rate is not None
    generator = torch.Generator().manual_seed(TRAINING_SEED + run.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def scale(batch: int) -> float:
        warm = min(1.0, (batch + 1) / (settings['warmup'] * batches))
        return warm * (0.55 + 0.45 * math.cos(math.pi * batch / batches))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for batch in range(1, batches + 1):
        model.train()
        x_BS, y_BS = sequences(settings['batch_size'], model.config.max_position_embeddings, generator)
        loss = F.cross_entropy(model(input_ids=x_BS).logits.flatten(0, 1), y_BS.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield batch
