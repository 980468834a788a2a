"""The logit lens, against the model itself and the states that Hugging Face hands out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import small_models
from common.token_rows import ITT, log_p_of_next, rows
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from itt_composer.export.load import as_ours
from research.figures import logit_lens


@pytest.mark.parametrize(
    'options',
    [{}, dict(thinking='loop', thinking_steps=2), dict(thinking='residual_scale'), ITT],
    ids=['plain', 'loop', 'residual_scale', 'itt'],
)
def test_the_lens_at_the_last_layer_is_the_model(options):
    model, ids = small_models.build(**options), rows()
    points = list(logit_lens.states(model, ids))
    last, x_BSD = points[-1]
    assert last.depth == last.layer + 1 == 4
    assert_close(logit_lens.log_probability(model, x_BSD, ids), log_p_of_next(model(ids).logits, ids))
    assert [point.depth for point, _ in points] == sorted(point.depth for point, _ in points)


def test_the_lens_reads_the_state_after_each_step():
    model, ids = small_models.build(**ITT), rows()
    points = {point[:2]: (point.depth, x_BSD) for point, x_BSD in logit_lens.states(model, ids)}
    assert list(points) == [(-1, 0), *((0, t) for t in range(4)), (1, 0), *((2, t) for t in range(4)), (3, 0)]
    assert [points[2, t][0] for t in range(4)] == [2.25, 2.5, 2.75, 3]
    # With the later steps removed, a layer's output is the state after the steps that are left.
    outputs = {}
    model.model.layers[0].register_forward_hook(lambda module, args, out: outputs.update(x=out[0]))
    for t, ratios in enumerate(([0, 0, 0], [0.7, 0, 0], [0.7, 0.7, 0], [0.7, 0.7, 0.7])):
        model.set_thinking(ratios)
        model(ids)
        assert_close(points[0, t][1], outputs['x'])


def test_the_lens_sees_a_block_as_one():
    model, ids = small_models.build(**small_models.MODELS['itt blocks refresh']), rows()
    points = [(point[:2], point.depth) for point, _ in logit_lens.states(model, ids)]
    steps = [((0, t), (t + 1) / 2) for t in range(4)], [((3, t), 3 + (t + 1) / 4) for t in range(4)]
    assert points == [((-1, 0), 0), *steps[0], ((2, 0), 3), *steps[1]]


def test_the_lens_of_a_plain_model_reads_what_hugging_face_hands_out():
    torch.manual_seed(0)
    shape = {key: value for key, value in small_models.SHAPE.items() if key != 'eos_token_id'}
    llama, ids = LlamaForCausalLM(LlamaConfig(**shape)).eval(), rows()
    hidden = llama(ids, output_hidden_states=True).hidden_states
    states = list(logit_lens.states(as_ours(llama, None), ids))
    for layer, (point, x_BSD) in enumerate(states[:-1]):
        assert point.layer == layer - 1
        assert_close(x_BSD, hidden[layer])


def test_the_lens_table_is_the_mean_over_tokens(few_documents):
    models = {'LLaMA': small_models.build(), 'ITT x4': small_models.build(**ITT)}
    ids = rows()
    table = logit_lens.measure(models, {'a': ids[:1], 'b': ids[1:]})
    for name, model in models.items():
        log_p = log_p_of_next(model(ids).logits, ids)
        last = table[(table['model'] == name) & (table['depth'] == 4)].iloc[0]
        assert last['log_probability'] == pytest.approx(log_p.mean().item(), rel=1e-5)
        assert last['probability'] == pytest.approx(log_p.exp().mean().item(), rel=1e-5)
        assert last['probability_low'] <= last['probability'] <= last['probability_high']
        embedded = model.model.embed_tokens(ids[:, :-1]).detach().double().numpy()
        first = table[(table['model'] == name) & (table['depth'] == 0)].iloc[0]
        assert first['rms'] == pytest.approx(np.sqrt((embedded**2).mean(-1)).mean(), rel=1e-5)
