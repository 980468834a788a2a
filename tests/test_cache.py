"""The cache of a model that thinks: cropped, reordered, repeated, grown in place, with steps that tokens skipped."""

import pytest
import torch
from common.small_models import KV, MODELS, build
from torch.testing import assert_close
from transformers import DynamicCache

from itt_composer.model.cache import NOWHERE, append


@torch.no_grad()
@pytest.mark.parametrize('kv', KV)
def test_a_cropped_or_reordered_cache_goes_on_as_if_it_had_never_been_longer(kv):
    model = build(**MODELS[f'itt weighted {kv}'])
    ids = torch.randint(97, (3, 50), generator=torch.Generator().manual_seed(2))
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(31)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    got = model(ids[[2, 0, 0], 31:], past_key_values=cache).logits
    assert_close(got, model(ids[[2, 0, 0]]).logits[:, 31:], rtol=1e-4, atol=1e-4)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    again = torch.cat([ids[[0, 0]], ids[[1, 2], :4]], 1)
    assert_close(model(again[:, 50:], past_key_values=cache).logits, model(again).logits[:, 50:], rtol=1e-4, atol=1e-4)


def test_nothing_depends_on_how_transformers_stores_a_cache(monkeypatch):
    """Which differs between its versions: of the base class, only the name is used."""
    model = build(**MODELS['itt weighted refresh'])
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    options = dict(max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, use_cache=False, **options)

    def refuse(*_, **__):
        raise AssertionError('a method of DynamicCache')

    for cls in DynamicCache.__mro__[:-1]:
        for name in vars(cls):
            if callable(vars(cls)[name]) and (name == '__getitem__' or not name.startswith('__')):
                monkeypatch.setattr(cls, name, refuse)
    monkeypatch.setattr(DynamicCache, '__init__', lambda self: None)
    monkeypatch.setattr(DynamicCache, 'key_cache', property(lambda self: refuse()), raising=False)
    assert torch.equal(model.generate(ids, **options), expected)


@torch.no_grad()
def test_a_sequence_that_has_chosen_nothing_is_repeated():
    """Its slot of the step is empty, and not one that nothing has touched."""
    model = build(**MODELS['itt weighted routed_only'])
    ids = torch.randint(97, (1, 50), generator=torch.Generator().manual_seed(2))
    cache = model(ids, use_cache=True).past_key_values
    first = {slot: int(position_BW.min()) for slot, position_BW in cache.position.items()}
    length = max(first.values())
    assert length > 0
    cache.crop(length)
    cache.batch_repeat_interleave(3)
    again = ids.repeat(3, 1)
    assert_close(model(again[:, length:], past_key_values=cache).logits, model(again).logits[:, length:])


def test_a_cache_made_in_inference_mode_goes_on_outside_it():
    model = build(**MODELS['itt weighted routed_only'])
    ids = torch.randint(97, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        cache = model(ids[:, :16], use_cache=True).past_key_values
    with torch.no_grad():
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(16, 24)]
        assert_close(torch.cat(got, dim=1), model(ids).logits[:, 16:], rtol=1e-4, atol=1e-4)


def test_a_cache_grows_as_torch_cat_would_have_it():
    """In place where there is room; never over what an older tensor or a backward pass still needs."""
    torch.manual_seed(0)
    want = got = torch.randn(2, 1, 3, 4)
    moved = set()
    for N in [1] * 40 + [7, 30]:
        new = torch.randn(2, 1, N, 4)
        want, got = torch.cat((want, new), dim=2), append(got, new)
        moved.add(got.data_ptr())
        assert torch.equal(got, want)
    assert len(moved) < 10
    assert torch.equal(append(got[:, :, 5:], new), torch.cat((want[:, :, 5:], new), dim=2))
    with torch.inference_mode():
        inside = append(append(want, new), new)
    assert torch.equal(append(inside, new), torch.cat((want, new, new, new), dim=2))

    weight = torch.ones(4, requires_grad=True)
    one = append(want * weight, new)
    loss = one.square().sum()
    append(one, new)
    loss.backward()
    assert_close(weight.grad, 2 * want.square().sum((0, 1, 2)))


@torch.no_grad()
@pytest.mark.parametrize('removed', [False, True])
def test_a_step_that_tokens_skipped_is_filled_up_when_it_is_taken_again(removed):
    """Its slot lags behind; also across a removed step, after a crop, and where the first token skipped it."""
    model = build(thinking='itt', thinking_kv='refresh')
    if removed:
        first, _, last = model.config.token_ratios
        model.set_thinking([first, 0, last])
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(2))
    cache, got, lags = model.new_cache(), [], set()
    for i in range(40):
        if i == 25:
            cache.crop(22)
            got = got[:22]
            for j in range(22, 25):
                got.append(model(ids[:, [j]], past_key_values=cache).logits)
        got.append(model(ids[:, [i]], past_key_values=cache).logits)
        lags |= {i + 1 - key.shape[2] for key in cache.keys if key.numel()}
    assert {0, 1, 2} <= lags
    assert_close(torch.cat(got, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_sequence_left_of_a_batch_has_no_gaps():
    """Whose neighbours chose more tokens, or which was cropped: its slots are as wide as its own tokens are many."""
    model = build(**MODELS['itt weighted routed_only'])
    ids = torch.randint(97, (3, 50), generator=torch.Generator().manual_seed(2))
    for b in range(3):
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([b]))
        cache.crop(31)
        assert all((position < NOWHERE).all() for position in cache.position.values())
        got = torch.cat([model(ids[b : b + 1, [i]], past_key_values=cache).logits for i in range(31, 50)], dim=1)
        assert_close(got, model(ids[b : b + 1]).logits[:, 31:], rtol=1e-4, atol=1e-4)
