"""What is measured on a trained model: loss and accuracy by position, routing, other numbers of steps.

N sequences of S tokens, T extra steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itt_composer.evaluation.calibrate import calibrate
from itt_composer.flops import Decoder, exact_flops
from itt_composer.model import ITTForCausalLM
from itt_composer.model.routing_state import RoutingRecord
from itt_composer.model.thinking import LoopLayer
from itt_composer.ratios import ratios_key
from research.state_tracking.task import GENERATORS

EVALUATION_BATCH = 256
ELASTIC_RATIOS, LOOP_STEPS = (0.3, 0.5, 0.7, 0.85, 1.0), range(7)


@torch.no_grad()
def evaluate(model: ITTForCausalLM, x_NS: Tensor, y_NS: Tensor) -> tuple[Tensor, Tensor, list[RoutingRecord]]:
    """Return loss (nats) and accuracy at each position, [S] each, and what each step of each layer routed."""
    model.eval()
    state = model.routing
    if state is None:
        logits_NSV, records = model(input_ids=x_NS).logits, []
    else:
        with state.recording() as records:
            logits_NSV = model(input_ids=x_NS).logits
    loss_NS = F.cross_entropy(logits_NSV.transpose(1, 2), y_NS, reduction='none')
    return loss_NS.mean(0), (logits_NSV.argmax(-1) == y_NS).float().mean(0), records


def routing_rows(records: Sequence[RoutingRecord], x_NS: Tensor) -> list[dict[str, Any]]:
    """Return for each step of each layer which fraction of which tokens it routes, and the values of its router."""
    rows: list[dict[str, Any]] = []
    before: RoutingRecord | None = None
    for record in records:
        routed_NS, logit_NS = record.routed_BS, record.gate_BS.double().logit(1e-7)
        earlier_NS = before.routed_BS if before is not None and before.layer == record.layer else None
        rows.append({
            'layer': record.layer,
            'step': record.step,
            'fraction': routed_NS.float().mean().item(),
            'gate_mean': record.gate_BS.mean().item(),
            'gate_std': record.gate_BS.std().item(),
            'logit_std': logit_NS.std().item(),
            # Of the variance of the logits, what differs between positions.
            'logit_position_share': (logit_NS.mean(0).var() / logit_NS.var()).item(),
            'threshold': float(record.threshold),
            # Of the tokens that the step before routed, the fraction that this one routes too.
            'routed_again': None if earlier_NS is None else routed_NS[earlier_NS].float().mean().item(),
            **{name: routed_NS[x_NS == g].float().mean().item() for g, name in enumerate(GENERATORS)},
            'fraction_by_position': text(routed_NS.float().mean(0).tolist(), 2),
        })  # fmt: skip
        before = record
    return rows


def elastic_rows(model: ITTForCausalLM, x_NS: Tensor, y_NS: Tensor, calibration_NS: Tensor) -> list[dict[str, Any]]:
    """Return the loss at other token ratios than those of the training; none for a model without extra steps.

    A Loop runs 0 to 6 extra steps. ITT first leaves out later steps, with its own thresholds, and then routes other
    ratios, with thresholds calibrated on ``calibration_NS``.
    """
    options, S, rows = model.config.to_dict(), x_NS.shape[1], []

    def measure(ratios: list[float], decoder: Decoder) -> None:
        loss_S, _, _ = evaluate(model, x_NS, y_NS)
        flops = exact_flops(decoder, S, ratios if model.routing else None).total
        rows.append({'ratios': ratios_key(ratios) or '0', 'flops': flops, 'loss': loss_S.mean().item()})

    if model.routing is not None:
        own, decoder = options['token_ratios'], Decoder.from_model_config(options)
        for steps in range(len(own)):
            ratios = [*own[:steps], *[0.0] * (len(own) - steps)]
            model.set_thinking(ratios)
            measure(ratios, decoder)
        for ratio in ELASTIC_RATIOS:
            ratios = [ratio] * len(own)
            calibrate(model, calibration_NS, ratios, EVALUATION_BATCH)
            model.set_thinking(ratios)
            measure(ratios, decoder)
    loops = [layer for layer in model.modules() if isinstance(layer, LoopLayer)]
    for steps in LOOP_STEPS if loops else ():
        for layer in loops:
            layer.T = steps
        more = Decoder.from_model_config(
            {**options, 'thinking_steps': steps or 1, 'token_ratios': [1.0] * (steps or 1)}
        )
        measure([1.0] * steps, more if steps else more.dense())
    return rows


def text(values: Sequence[float], digits: int) -> str:
    """Return the numbers in one cell of a table, separated by blanks."""
    return ' '.join(f'{value:.{digits}f}' for value in values)
