"""Random mistakes: a changed override or a random model is refused in one line, or does what it says.

``ITT_FUZZ=1200,600`` sets how many overrides and models are tried, and ``ITT_FUZZ_SEED`` which.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from common.shards import write_data
from omegaconf import OmegaConf

from itt_composer import ITTConfig, ITTForCausalLM
from itt_composer.config.run_file import resolve
from itt_composer.options import ModelOptions

pytestmark = pytest.mark.usefixtures('elsewhere')
OVERRIDES, MODELS = map(int, os.environ.get('ITT_FUZZ', '30,75').split(','))
SEED = int(os.environ.get('ITT_FUZZ_SEED', '0'))
VALUES = [
    *('-1', '0', '1', '2', '7', '-0.5', '0.5', '1.0', '1e30', '1e-30', '.nan', '.inf', '-.inf', '99999999999999999999'),
    *('', 'abc', '"false"', '"1"', 'true', 'false', 'null', '~', '[]', '[1,2]', '[a]', '[[1]]', '{}', '{a: 1}'),
    *('0ba', '-5ba', '5ba', '1.5ba', '1e99tok', '2gb', '2dur', '0.1dur', '3parsecs'),
    *('???', '${nothing}', '${max_seq_len}', "it's", 'ü'),
]
# Mappings whose keys are the user's own.
FREE = ('variables.proportions', 'metadata')


def flat(config: Any, prefix: str = '') -> list[str]:
    if not isinstance(config, Mapping):
        return []
    keys = [f'{prefix}{key}' for key in config]
    return keys + [inner for key, value in config.items() for inner in flat(value, f'{prefix}{key}.')]


def misspelt(rng: random.Random, key: str) -> str:
    head, _, last = key.rpartition('.')
    i = rng.randrange(len(last))
    last = rng.choice([last[:i] + last[i + 1 :], last[: i + 1] + last[i:], last[:i] + 'x' + last[i:], f'{last}_'])
    return f'{head}.{last}' if head else last


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> list[str]:
    data = write_data(tmp_path_factory.mktemp('data'), {'arxiv': 64}, {'arxiv': 5})
    return [f'variables.data={data}', 'max_seq_len=32', 'fsdp_config={activation_checkpointing: false}']


def test_a_mutated_override_is_refused_in_one_line_or_taken(small):
    rng = random.Random(SEED)
    config = OmegaConf.to_container(resolve('itt_x4_tiny', small))
    known = [key for key in flat(config) if not key.startswith(('variables.parts', 'variables.data'))]
    known = [key for key in known if 'streams' not in key and 'threshold_commit' not in key]
    known += [f'model.{key}' for key in ModelOptions.keys()]
    known += ['train_loader.dataset.cache_limit', 'compile_config.backend', 'optimizer.weight_decay']
    refused = 0
    for _ in range(OVERRIDES):
        key, value = rng.choice(known), rng.choice(VALUES)
        wrong = rng.random() < 0.4
        if wrong:
            key = misspelt(rng, key)
        override = rng.choice(['', '', '', '', '', '', '', '+', '--', '~']) + f'{key}={value}'
        try:
            resolve('itt_x4_tiny', [*small, override])
        except ValueError as error:
            refused += 1
            assert '\n' not in str(error) and str(error), override
        except Exception as error:
            raise AssertionError(override) from error
        else:
            assert not wrong or key in known or key.startswith(FREE), f'{override} is taken, and nothing reads it'
    assert 0.4 * OVERRIDES < refused < OVERRIDES


def random_value(rng: random.Random, name: str) -> Any:
    field = next(f for f in fields(ModelOptions) if f.name == name)
    if choices := field.metadata.get('choices'):
        return rng.choice([*choices, *choices, 'none', 'abc', None])
    bounds = [field.metadata[key] for key in ('minimum', 'above', 'maximum') if key in field.metadata]
    numbers = [0, 1, 2, 3, 0.25, 1.0, -1, -0.5, math.nan, math.inf, *(bound for bound in bounds if bound < 1000)]
    kinds = {
        'bool': [True, False, True, False, 'false', 1, None],
        'int': [1, 2, 3, 4, 8, 0, -1, 2.0, 10**20, True, '3', None],
        'float': [*numbers, 0.02, 0.5, 1, '1.0', None, 1e30],
        'list': [None, [], [0], [1], [0, 1], [0, 2], [0.5], [0.5, 0.3], [0.7, 0.7, 0.9], [2], '0.5/0.5', [True], 0.5,
                 [[0, 1]], [[0, 1], 2], [[0, 2]], [[1, 0]], [[0], [1]], [[]]],
        'dict': [None, {}, 'linear', {'factor': 2.0}, {'rope_type': 'linear', 'factor': 2}, {'rope_type': 'yarn'},
                 {'rope_type': 'linear', 'factor': -1.0},
                 {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                  'original_max_position_embeddings': 8}],
    }  # fmt: skip
    kind = next(kind for kind in ('dict', 'list', 'bool', 'int', 'float') if kind in str(field.type))
    return rng.choice([*kinds[kind], *(kinds['float'] if 'float' in str(field.type) else [])])


def test_a_random_model_is_refused_or_has_a_finite_loss():
    rng = random.Random(SEED)
    built = 0
    for i in range(MODELS):
        options: dict[str, Any] = dict(
            vocab_size=23, hidden_size=rng.choice([8, 12, 16]), intermediate_size=rng.choice([4, 10]),
            num_hidden_layers=rng.choice([1, 2, 3]), num_attention_heads=rng.choice([1, 2, 4]),
            num_key_value_heads=rng.choice([None, 1, 2]), max_position_embeddings=16,
            thinking=rng.choice(['none', 'loop', 'itt', 'itt', 'itt', 'residual_scale']),
        )  # fmt: skip
        fixed = ('vocab_size', 'hidden_size', 'intermediate_size', 'max_position_embeddings')
        others = [key for key in ModelOptions.keys() if key not in fixed]
        options |= {key: random_value(rng, key) for key in rng.sample(others, rng.choice([0, 1, 2, 3]))}
        torch.manual_seed(i)
        try:
            model = ITTForCausalLM(ITTConfig(**options))
        except ValueError as error:
            assert '\n' not in str(error) and str(error), options
            continue
        except Exception as error:
            raise AssertionError(options) from error
        built += 1
        ids = torch.randint(0, 23, (2, 11))
        for training in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                loss = model.train(training)(ids, labels=ids).loss
            assert loss.isfinite(), options
            if training:
                loss.backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), options
    assert 0.2 * MODELS < built < MODELS
