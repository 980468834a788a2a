"""The study of fine-tuning: its table, and its runs when the study is started again; nothing is trained here."""

from __future__ import annotations

import hashlib
import json

import pytest
from common.pretrained import write_pretrained, write_questions
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from itt_composer.config.run_file import resolve
from itt_composer.flops import Decoder, exact_flops
from research.study.folder import StudyFolder
from research.study.results import collect, final
from research.study.stored import data_of
from research.study.study_file import load_study


def an_itt(folder):
    """ITT x2 of the study: its run and config, the pretrained model and the examples."""
    model, data = write_pretrained(folder / 'model'), write_questions(folder / 'data', test=6)
    overrides = [f'set.model.pretrained={model}', f'set.variables.data={data}', 'set.max_seq_len=192']
    study = load_study('fine_tuning', [*overrides, 'set.max_duration=4ba', 'seeds=[17]'])
    run = next(run for run in study.main_runs(folder, {}) if run.variant == 'itt_x2')
    return run, resolve(run.run_file, run.overrides), model, data


def test_fine_tuning_counts_the_tokens_of_its_examples(tmp_path):
    run, config, _, data = an_itt(tmp_path)
    with SummaryWriter(str(tmp_path / 'tensorboard' / run.name)) as writer:
        for batch in range(4):
            writer.add_scalar('time/token', 100 * (batch + 1), batch)
        writer.add_scalar('metrics/eval/test/LanguageCrossEntropy', 2.5, 4)
    last = final(collect('fine_tuning', run, config)).iloc[0]
    assert (last.batch, last.tokens, last.loss_threshold) == (4, 400, 2.5)
    # Four batches of two examples: 50 tokens each in the mean.
    decoder = Decoder.from_model_config(OmegaConf.to_container(config.model))
    assert last.exact_flops == pytest.approx(3 * 8 * exact_flops(decoder, 50).total)
    before = data_of(config)
    write_questions(data, test=5)
    assert data_of(config) != before


def test_runs_of_other_weights_are_refused_when_the_study_is_started_again(tmp_path):
    run, config, model, _ = an_itt(tmp_path)
    config.variables.pretrained_weights = hashlib.sha256((model / 'model.safetensors').read_bytes()).hexdigest()
    (tmp_path / run.name).mkdir()
    record = {'config': OmegaConf.to_container(config, resolve=True)}
    (tmp_path / run.name / 'manifest.json').write_text(json.dumps(record))
    study = load_study('fine_tuning')
    assert StudyFolder(study, tmp_path).add([run]) == [run]
    record['config']['variables']['pretrained_weights'] = 'others'
    (tmp_path / run.name / 'manifest.json').write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r'another config: variables\.pretrained_weights was others'):
        StudyFolder(study, tmp_path).add([run])
