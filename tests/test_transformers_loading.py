"""What is loaded is the model that was saved: on disk, with other ratios, through the wrong door."""

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from common.small_models import SHAPE, build
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from itt_composer.model import ITTConfig, ITTForCausalLM, thinking_layers

SMALL = {**SHAPE, 'num_hidden_layers': 2}
IDS = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(2))


def itt(**options) -> ITTForCausalLM:
    return build(thinking='itt', evaluation_selection='threshold', **options)


@pytest.mark.parametrize('where', ['named', 'auto'])
def test_thresholds_of_layers_on_disk(tmp_path, where):
    model = itt()
    model.save_pretrained(tmp_path)
    device_map, options = 'auto', dict(max_memory={'cpu': '60KB'})
    if where == 'named':
        device_map, options = {'model.embed_tokens': 'cpu', 'model.norm': 'cpu', 'lm_head': 'cpu'}, {}
        device_map |= {f'model.layers.{i}': 'disk' for i in range(4)}
    loaded = ITTForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / 'off', **options)
    for i, layer in thinking_layers(loaded).items():
        assert layer.block.mlp.up_proj.weight.is_meta
        assert torch.equal(layer.threshold_T, model.model.layers[i].threshold_T)
    with torch.no_grad():
        assert_close(loaded(IDS).logits, model(IDS).logits)


def test_thresholds_that_accelerate_leaves_out(tmp_path):
    """It reads no buffers of layers on disk, unless it is told to offload them too."""
    model = itt()
    model.save_pretrained(tmp_path)
    places = {'model.embed_tokens': 'cpu', 'model.norm': 'cpu', 'lm_head': 'cpu'}
    places |= {f'model.layers.{i}': 'disk' for i in range(4)}
    for buffers in (False, True):
        with init_empty_weights():
            empty = ITTForCausalLM(model.config)
        options = dict(offload_folder=tmp_path / f'off{buffers}', offload_buffers=buffers)
        loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / 'model.safetensors'), places, **options).eval()
        with torch.no_grad():
            if buffers:
                assert_close(loaded(IDS).logits, model(IDS).logits)
            for _ in range(0 if buffers else 2):
                with pytest.raises(ValueError, match=r'layers on disk were not read.* offload_buffers=True'):
                    loaded(IDS)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_thresholds_stay_in_float32(tmp_path, dtype):
    model = itt()
    model.save_pretrained(tmp_path)
    for other in (ITTForCausalLM.from_pretrained(tmp_path, torch_dtype=dtype), itt().to(dtype)):
        assert other.dtype is dtype
        for i, layer in thinking_layers(other).items():
            assert torch.equal(layer.threshold_T, model.model.layers[i].threshold_T)


def test_ratios_without_thresholds_are_refused(tmp_path):
    model = itt()
    model.save_pretrained(tmp_path)
    other = dict(token_ratios=[0.9, 0.9, 0.9])
    for load in (ITTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r'token_ratios: no thresholds for 0.9/0.9/0.9 .* calibrate'):
            load(tmp_path, **other)
    with pytest.raises(ValueError, match=r'no thresholds for 0.9/0.9/0.9'):
        ITTForCausalLM.from_pretrained(tmp_path, config=ITTConfig.from_pretrained(tmp_path, **other))
    ITTForCausalLM.from_pretrained(tmp_path, token_ratios=model.config.token_ratios)
    # Top-k routing needs none; the ratios are those of evaluation, and the model is still one trained at its own.
    top_k = ITTForCausalLM.from_pretrained(tmp_path, evaluation_selection='top_k', **other)
    assert top_k.routing.ratios_T(training=False) == [0.9] * 3 and top_k.config.token_ratios == [0.5] * 3


@pytest.mark.parametrize('load', [ITTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_ratios_with_calibrated_thresholds_are_set(tmp_path, load):
    model = itt()
    model.config.calibrated_thresholds = {'0.9/0.9/0.9': [[-1.0, -2.0, -3.0]] * 2}
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, token_ratios=[0.9, 0.9, 0.9])
    model.set_thinking([0.9, 0.9, 0.9])
    assert loaded.routing == model.routing and loaded.config.token_ratios == [0.5] * 3
    assert_close(loaded(IDS).logits, model(IDS).logits)


def test_what_is_uploaded_has_the_code(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(ITTForCausalLM, '_create_repo', lambda self, repo, **_: repo)
    hub = 'transformers.utils.hub.create_commit'
    monkeypatch.setattr(hub, lambda operations, **_: uploaded.extend(part.path_in_repo for part in operations))
    monkeypatch.setattr('transformers.utils.hub.create_branch', lambda **_: None)
    build(thinking='itt').save_pretrained(str(tmp_path / 'model'), push_to_hub=True)
    assert {'config.json', 'model.safetensors', 'modeling_itt.py'} <= set(uploaded)


def test_another_familys_folder_names_the_way(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'holds a model of the family llama; .* ITTForCausalLM.from_pretrained_dense'):
        ITTForCausalLM.from_pretrained(tmp_path, thinking='itt')
