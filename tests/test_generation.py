"""Section 5 of the specification: with ``threshold`` no token sees ahead, and decoding from a cache changes nothing."""

import pytest
import torch
from common.small_models import KV, MODELS, SHAPE, build, share_routed
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from itt_composer.model import ITTForCausalLM, thinking_layers


def leak(model, S=70, padding=0) -> float:
    """The largest change of a logit that another end of the text makes to any logit before it, in float64."""
    model, ids = model.double(), torch.randint(97, (2, S), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    before, largest = model(ids, mask).logits[:, padding:], 0.0
    for j in (1, 33, S - padding - 1):
        changed = ids.clone()
        changed[:, padding + j :] = (
            changed[:, padding + j :] + 1 + torch.arange(2)[:, None] + torch.arange(S - padding - j)
        ) % 97
        after = model(changed, mask).logits[:, padding:]
        assert (after[:, j] - before[:, j]).abs().max() > 1e-6
        largest = max(largest, (after[:, :j] - before[:, :j]).abs().max().item())
    return largest


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'padding'), [*((name, 9) for name in MODELS), ('plain', 0), ('itt weighted refresh', 0)]
)
def test_no_logit_depends_on_a_later_token(name, padding):
    model = build(**MODELS[name])
    assert model.selection in (None, 'threshold')
    assert leak(model, padding=padding) < 1e-10
    if name.startswith('itt') and name != 'itt unrouted':
        for selection in ('top_k', 'top_p'):
            model.set_thinking(selection=selection)
            assert leak(model, padding=padding) > 1e-6, 'the test above could not fail'


@torch.no_grad()
@pytest.mark.parametrize('kv', KV)
def test_no_logit_depends_on_a_later_token_of_a_long_text(kv):
    """Longer than the chunks of attention on a CPU."""
    assert leak(build(thinking='itt', thinking_kv=kv, max_position_embeddings=600), S=523, padding=60) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'thinking_layers', 'last'),
    [
        ('plain', None, 1),
        ('loop', [0, 2], 5),
        ('itt weighted refresh', [0, 2], 1),
        ('itt weighted refresh', [1, 3], 40),
        ('itt equation7 routed_only', [0, 2], 1),
        ('itt equation7 routed_only', [1, 3], 5),
    ],
)
def test_the_logits_that_are_kept_are_those_of_the_full_pass(name, thinking_layers, last):
    model = build(**MODELS[name], thinking_layers=thinking_layers)
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    whole = model(ids, mask)
    kept = model(ids, mask, logits_to_keep=last)
    assert kept.logits.shape == (2, last, 97)
    assert_close(kept.logits, whole.logits[:, -last:])

    cache = model(ids[:, :25], mask[:, :25], logits_to_keep=last, use_cache=True).past_key_values
    rest = model(ids[:, 25:], mask, past_key_values=cache, logits_to_keep=1)
    assert_close(rest.logits, whole.logits[:, -1:])


def test_a_loss_is_of_all_tokens_whatever_logits_are_kept():
    model = build(**MODELS['plain'])
    ids = torch.randint(97, (2, 20))
    whole = model(ids, labels=ids)
    assert_close(model(ids, labels=ids, with_logits=False, logits_to_keep=1).loss, whole.loss)
    kept = model(ids, labels=ids, logits_to_keep=3)
    assert_close(kept.loss, whole.loss)
    assert torch.equal(kept.logits, whole.logits[:, -3:])


def test_a_cache_goes_on_under_a_causal_rule_alone_and_with_a_mask_of_its_tokens_too():
    model = build(**MODELS['itt weighted refresh'])
    ids = torch.randint(97, (2, 20))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r'attention_mask: \[2, 1\], for 2 texts of 21 tokens'):
        model(ids[:, :1], torch.ones(2, 1), past_key_values=cache)
    model.set_thinking(selection='top_k')
    with pytest.raises(ValueError, match='selection: top_k lets later tokens decide'):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize('name', ['loop', 'residual_scale', 'itt weighted refresh', 'itt weighted routed_only'])
def test_a_cache_without_places_for_the_steps_is_refused(name):
    model = build(**MODELS[name])
    ids = torch.randint(97, (1, 9))
    with pytest.raises(ValueError, match='a DynamicCache has no place for the extra steps'):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match='a DynamicCache has no place'):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=3)


def decode(model, ids, mask, prompt):
    """Logits of the whole text: the prompt in one call, then token by token, and some tokens at once."""
    cache, logits, start = model.new_cache(), [], 0
    for N in [prompt] + [1] * 8 + [47] + [1] * 20:
        end = min(start + N, ids.shape[1])
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:end]
        logits.append(model(ids[:, start:end], mask[:, :end], positions, past_key_values=cache).logits)
        start = end
        if end == ids.shape[1]:
            return torch.cat(logits, 1), cache


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'dtype', 'tolerance'),
    [(name, torch.float64, 1e-10) for name in MODELS] + [(f'itt weighted {kv}', torch.float32, 1e-4) for kv in KV],
)
def test_cached_logits_are_those_of_the_full_pass(name, dtype, tolerance):
    model = build(**MODELS[name]).to(dtype)
    ids = torch.randint(97, (3, 75), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[2, :5] = 0, 0
    if name.startswith('itt') and name != 'itt unrouted':
        assert all(0.1 < share < 0.9 for share in share_routed(model, ids))
    expected = model(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)).logits
    got, cache = decode(model, ids, mask, prompt=12)
    assert cache.get_seq_length() == 75
    assert_close(got[mask.bool()], expected[mask.bool()], rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    'name', ['plain', 'loop', 'itt weighted refresh', 'itt weighted shared', 'itt weighted routed_only']
)
def test_memory_per_token_is_what_the_cache_module_says(name):
    model = build(**MODELS[name])
    ids = torch.randint(97, (1, 120), generator=torch.Generator().manual_seed(2))
    cache = model(ids, use_cache=True).past_key_values
    kept = (cache.key_cache + cache.value_cache) if name == 'plain' else (cache.keys + cache.values)
    kept = sum(x.numel() for x in kept) / (120 * 2 * 2 * 8)
    expected = {
        'plain': 4,
        'loop': 2 * 1 + 2 * 3,
        'itt weighted refresh': 2 * 1 + 2 * 4,
        'itt weighted shared': 4,
        'itt weighted routed_only': 4 + sum(share_routed(model, ids)),
    }
    assert kept == pytest.approx(expected[name], abs=1e-4)
    assert isinstance(cache, DynamicCache)


@torch.no_grad()
@pytest.mark.parametrize('kv', KV)
def test_decoding_computes_only_the_steps_that_are_taken(kv):
    """Passes of the block for one token: one a layer, and one more for each step that it is routed to."""
    model = build(**MODELS[f'itt weighted {kv}'])
    rows = []
    for layer in model.model.layers:
        block = getattr(layer, 'block', layer)
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel()))
    cache = model.new_cache()
    ids = torch.randint(97, (3, 30), generator=torch.Generator().manual_seed(2))
    for i in range(30):
        rows.clear()
        with model.routing.recording() as records:
            model(ids[:, i : i + 1], past_key_values=cache)
        assert sum(rows) == 3 * 4 + sum(int(record.routed_BS.sum()) for record in records)


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options)


@pytest.mark.parametrize(
    ('name', 'how'),
    [
        *((name, dict(do_sample=False)) for name in ('plain', 'loop', *(f'itt weighted {kv}' for kv in KV))),
        ('itt equation7 routed_only', dict(do_sample=True, top_p=0.9)),
        ('itt weighted refresh', dict(num_beams=3, do_sample=False)),
        ('itt delta shared', dict(num_beams=3, do_sample=False)),
    ],
)
def test_generation_with_a_cache_is_generation_without(name, how):
    """Prompts of different length, padded on the left, in one batch; each gives what it gives alone."""
    model = build(**MODELS[name])
    ids = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :2] = 0, 0
    got = generate(model, ids, mask, **how)
    assert got.shape == (3, 24)
    assert torch.equal(got, generate(model, ids, mask, use_cache=False, **how))
    if not how['do_sample']:
        alone = generate(model, ids[:1, 5:], mask[:1, 5:], **how)
        assert torch.equal(got[0, 5:], alone[0])


def test_the_plain_model_generates_what_llama_does():
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for how in (dict(do_sample=False), dict(num_beams=2, do_sample=False), dict(do_sample=True)):
        ours = generate(ITTForCausalLM.from_pretrained_dense(llama).eval(), ids, mask, **how)
        assert torch.equal(ours, generate(llama, ids, mask, **how))


def test_positions_of_the_prompt_are_those_of_its_tokens_alone():
    model = build(**MODELS['itt weighted shared'])
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, position_ids=torch.arange(12).expand(2, 12), **how), wanted)


@torch.no_grad()
@pytest.mark.parametrize('kv', KV)
@pytest.mark.parametrize('takes', [True, False])
def test_one_token_that_takes_every_step_or_none(kv, takes):
    """Decoding has a path for each; padded or alone, they give what the full pass gives."""
    for options in (dict(combine='equation7', residual_thinking=False), dict(reweighting='symmetric')):
        model = build(thinking='itt', thinking_kv=kv, **options)
        for layer in thinking_layers(model).values():
            layer.threshold_T.fill_(-1e9 if takes else 1e9)
        ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        expected = model(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)).logits
        got, _ = decode(model, ids, mask, prompt=9)
        assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        assert_close(decode(model, ids[1:], mask[1:], prompt=1)[0], expected[1:], rtol=1e-4, atol=1e-4)


def test_bad_input_is_named():
    model = build(**MODELS['itt weighted refresh'])
    ids = torch.ones(1, 250, dtype=torch.long)
    with pytest.raises(ValueError, match='257 tokens, and the model has 256 positions'):
        model(torch.ones(1, 257, dtype=torch.long))
    with pytest.raises(ValueError, match='the model has 256 positions; shorten the context'):
        model.generate(ids, max_new_tokens=10)
    with pytest.raises(ValueError, match='low_memory'):
        model.generate(ids[:, :5], max_new_tokens=3, num_beams=2, low_memory=True, do_sample=False, top_k=None)
    with pytest.raises(ValueError, match='assistant_early_exit: not supported'):
        model.generate(ids[:, :5], max_new_tokens=3, assistant_early_exit=1, do_sample=False)
    model.set_thinking(selection='top_k')
    for call in (lambda: model.generate(ids[:, :5], max_new_tokens=3), lambda: model(ids, use_cache=True)):
        with pytest.raises(ValueError, match='top_k lets later tokens decide'):
            call()
