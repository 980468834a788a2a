"""Converted shards through foundry's own text loader."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from common.shards import write_data
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.conversion import convert
from itt_composer.config.run_file import resolve

RUN_FILE = Path(__file__).parents[1] / 'yamls/itt_x4_tiny.yaml'


END = '<|endoftext|>'


@pytest.mark.parametrize(
    ('special', 'vocabulary'),
    [
        ({'unk_token': END, 'bos_token': END, 'eos_token': END}, 200),  # GPT-2's own
        ({'bos_token': END, 'eos_token': END}, 70_000),  # more than uint16 counts
    ],
)
def test_every_position_is_a_target_of_the_loss(tmp_path, special, vocabulary):
    """Through the training config, foundry's tokenizer and its loader; the tokens are those of the text."""
    from llmfoundry.data.dataloader import build_dataloader
    from llmfoundry.utils.builders import build_tokenizer

    words = {f'w{n}': n for n in range(vocabulary)} | {END: vocabulary}
    rust = Tokenizer(models.WordLevel(words, unk_token='w0'))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=rust, **special).save_pretrained(tmp_path / 'given')
    (tmp_path / 'in/notes').mkdir(parents=True)
    numbers = [[vocabulary - 1 - (7 * n + i) % 150 for i in range(20)] for n in range(100)]
    lines = [json.dumps({'text': ' '.join(f'w{i}' for i in document)}) + '\n' for document in numbers]
    (tmp_path / 'in/notes/a.jsonl').write_text(''.join(lines))
    convert(tmp_path / 'in', tmp_path / 'out', str(tmp_path / 'given'), seq_len=64, validation_tokens=0, workers=1)
    overrides = [f'variables.data={tmp_path}/out', 'max_seq_len=64', 'global_train_batch_size=1']
    overrides += ['train_loader.dataset.num_canonical_nodes=1', 'train_loader.dataset.shuffle=false']
    config = OmegaConf.to_container(resolve(RUN_FILE, overrides))
    tokenizer = build_tokenizer(config['tokenizer']['name'], config['tokenizer']['kwargs'])
    batches = list(build_dataloader(config['train_loader'], tokenizer, 1).dataloader)
    found = [token for batch in batches for token in batch['input_ids'].flatten().tolist()]
    expected = [token for document in numbers for token in (vocabulary, *document, vocabulary)]
    assert len(found) == len(expected) // 64 * 64 and found == expected[: len(found)]
    assert all((batch['labels'] == batch['input_ids']).all() for batch in batches)


def test_a_run_resumed_in_one_epoch_has_the_next_epochs_batches(tmp_path):
    """100 rows in rounds of 64 canonical nodes: streaming fills up to 128, which a resumed epoch would read."""
    from llmfoundry.data.text_data import build_text_dataloader

    data = write_data(tmp_path, {'arxiv': 70, 'wiki': 30}, {})
    config = OmegaConf.to_container(resolve(RUN_FILE, [f'variables.data={data}', 'max_seq_len=32']))
    del config['train_loader']['name']
    tokenizer = AutoTokenizer.from_pretrained(data / 'tokenizer')

    def loader():
        return build_text_dataloader(tokenizer, device_batch_size=8, **deepcopy(config['train_loader'])).dataloader

    def epoch(of, length):
        """As Composer's trainer draws it: at most the loader's length, counted from where it begins or resumes."""
        return [tuple(batch['input_ids'].flatten().tolist()) for batch, _ in zip(of, range(length), strict=False)]

    whole = loader()
    first, second = epoch(whole, len(whole)), epoch(whole, len(whole))
    resumed = loader()
    resumed.dataset.load_state_dict(whole.dataset.state_dict(0, True) | {'epoch': 0, 'sample_in_epoch': 3 * 8})
    assert epoch(resumed, len(resumed)) == first[3:]
    assert epoch(resumed, len(resumed)) == second


def test_run_file_evaluates_each_domain_and_all_of_them(tmp_path):
    """The merged set has the domains' rows without copies; a domain too small for validation rows has no set."""
    from llmfoundry.utils.builders import build_eval_loaders

    for domain, count in (('cc', 60), ('wiki', 30), ('arxiv', 1)):
        (tmp_path / 'in' / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{domain} {n} ' * 30}) + '\n' for n in range(count)]
        (tmp_path / 'in' / domain / 'a.jsonl').write_text(''.join(lines))
    out = tmp_path / 'out'
    manifest = convert(tmp_path / 'in', out, seq_len=32, validation_tokens=3000, workers=1)
    shards = list(out.glob('validation/**/*.mds'))
    overrides = [f'variables.data={out}', 'max_seq_len=32', 'variables.proportions=null']
    assert [loader.label for loader in resolve(RUN_FILE, overrides).eval_loader] == ['cc', 'wiki']
    config = OmegaConf.to_container(resolve(RUN_FILE, [*overrides, 'variables.merged_validation=true']))
    evaluators = build_eval_loaders(config['eval_loader'], AutoTokenizer.from_pretrained(out / 'tokenizer'), 4)
    rows = {e.label: [tuple(r) for b in e.dataloader.dataloader for r in b['input_ids'].tolist()] for e in evaluators}
    assert sorted(rows['eval/merged']) == sorted(rows['eval/cc'] + rows['eval/wiki'])
    assert len(rows['eval/merged']) == sum(d['validation']['rows'] for d in manifest['domains'].values()) > 4
    assert sorted(path.name for path in out.glob('validation/**/*.mds')) == sorted(path.name for path in shards)
    logged = config['variables']['data_manifest']
    assert (logged['content_sha256'], logged['domains']) == (manifest['content_sha256'], manifest['domains'])
    # The same text copied elsewhere later is the same data.
    copied = shutil.copytree(tmp_path / 'in', tmp_path / 'copied', copy_function=shutil.copyfile)
    again = convert(copied, tmp_path / 'again', seq_len=32, validation_tokens=3000, workers=1)
    assert again['sha256'] != manifest['sha256']
    data = resolve(RUN_FILE, [*overrides, f'variables.data={tmp_path / "again"}']).variables.data_manifest
    assert data.content_sha256 == logged['content_sha256']
    # Streamed from a store, the manifest alone says which sets there are.
    (tmp_path / 'cache').mkdir()
    for name in ('manifest.json', 'tokenizer'):
        (tmp_path / 'cache' / name).symlink_to(out / name)
    remote = [f'variables.data={tmp_path / "cache"}', 'variables.remote=s3://bucket/x', 'variables.proportions={cc: 1}']
    loaders = resolve(RUN_FILE, [*remote, 'max_seq_len=32', 'variables.merged_validation=true']).eval_loader
    assert [(loader.label, loader.dataset.remote) for loader in loaders] == [
        ('cc', 's3://bucket/x/validation/cc'),
        ('wiki', 's3://bucket/x/validation/wiki'),
        ('merged', 's3://bucket/x/validation'),
    ]
