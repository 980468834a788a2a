"""What each algorithm and callback is trained with in test_algorithms_callbacks.py; add a row for every new one.

DynamicBatchLoading has none: it changes the rows that are drawn, and trains and resumes on streams of its own in
test_dynamic_batch_loading.py.

A row is the class, its settings, metrics it must log, and model keys that it needs beyond those of ``TINY_ITT``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from itt_composer.algorithms.capacity_warmup import CapacityWarmup
from itt_composer.callbacks.causal_gap import CausalGap
from itt_composer.callbacks.gradient_nuclear_norm import GradientNuclearNorm
from itt_composer.callbacks.router_weights import RouterWeights
from itt_composer.callbacks.step_encodings import StepEncodings

TINY_ITT = {
    'vocab_size': 64,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 3,
    'num_attention_heads': 2,
    'max_position_embeddings': 32,
    'thinking': 'itt',
    'token_ratios': [0.5, 0.25],
    'embedding_initializer_range': 0.5,
    'router_initializer_range': 0.1,
    'use_train_metrics': False,
}


class Part(NamedTuple):
    cls: type
    settings: dict[str, Any]
    metrics: set[str]


PARTS = [
    Part(
        CapacityWarmup,
        {'duration': '4ba', 'initial': [0.1, 0.05], 'final': 1.0, 'shape': 'cosine', 'initial_temperature': 2.0},
        {'capacity/step1', 'capacity/step2', 'router_temperature'},
    ),
    Part(
        RouterWeights,
        {'interval': '2ba'},
        {
            'router/layer0/step1/gate_mean',
            'router/layer2/step2/gate_q05',
            'router/layer2/step1/fraction_routed',
            'router/layer0/step2/threshold',
        },
    ),
    Part(
        StepEncodings,
        {'interval': '2ba'},
        {'step_encoding/layer0/step0/mean', 'step_encoding/layer2/step2/norm'},
    ),
    Part(
        GradientNuclearNorm,
        {'interval': '2ba'},
        {'gradient_nuclear_norm/layer0/q_proj', 'gradient_nuclear_norm/layer1/o_proj'},
    ),
    Part(CausalGap, {}, set()),  # what it logs, it logs in evaluations: test_causal_routing_training.py
]
