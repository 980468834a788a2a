"""Names of earlier training configs, checkpoints and exported folders are read under today's, each with a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from common.small_models import build

from itt_composer import ITTConfig, ITTForCausalLM
from itt_composer.config.run_file import resolve_model

ITT = Path(__file__).resolve().parents[1] / 'yamls' / 'itt_x4_162m.yaml'


@pytest.mark.parametrize(
    ('key', 'old', 'key_now', 'now', 'message'),
    [
        ('thinking', 'growth', 'thinking', 'residual_scale', "model.thinking: 'growth' is now 'residual_scale'"),
        ('thinking_kv', 'chosen', 'thinking_kv', 'routed_only', "model.thinking_kv: 'chosen' is now 'routed_only'"),
        ('reweighting', 'chosen', 'reweighting', 'routed_only', "model.reweighting: 'chosen' is now 'routed_only'"),
        ('growth_init', 1.5, 'residual_scale_init', 1.5, 'model.growth_init is now model.residual_scale_init'),
    ],
)
def test_a_run_file_and_a_config_with_an_old_name(key, old, key_now, now, message):
    overrides = ['parts.family=llama', 'model.thinking=itt', f'model.{key}={old}']
    with pytest.warns(FutureWarning) as warned:
        assert resolve_model(ITT, overrides)[0][key_now] == now
    with pytest.warns(FutureWarning) as warned_too:
        config = ITTConfig.from_options('model', **{'thinking': 'itt', key: old})
    assert getattr(config, key_now) == now
    for warnings_of_one_key in (warned, warned_too):
        assert [str(w.message).split(';')[0] for w in warnings_of_one_key] == [message]


def test_an_old_config_group():
    with pytest.warns(FutureWarning, match="parts.family: 'growth' is now 'residual_scale'"):
        old = resolve_model(ITT, ['parts.family=growth'])
    assert old == resolve_model(ITT, ['parts.family=residual_scale'])
    with pytest.warns(FutureWarning):
        assert resolve_model(ITT, ['parts.family=[llama,growth]'])[0]['thinking'] == 'residual_scale'


@pytest.mark.parametrize(
    ('options', 'old_names'),
    [
        ({'thinking': 'residual_scale', 'residual_scale_init': 1.5}, {'thinking': 'growth', 'growth_init': 1.5}),
        ({'thinking': 'itt', 'thinking_kv': 'routed_only'}, {'thinking_kv': 'chosen', 'reweighting': 'chosen'}),
    ],
)
def test_a_saved_folder_with_old_names_loads(tmp_path, options, old_names):
    model = build(**options)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    saved.pop('residual_scale_init')
    (tmp_path / 'config.json').write_text(json.dumps(saved | old_names))
    with pytest.warns(FutureWarning, match='is now'):
        loaded = ITTForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    loaded.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', FutureWarning)
        ITTConfig.from_pretrained(tmp_path)
