"""A converted folder passes the check, and every kind of damage is found and named."""

import json
import shutil

import numpy as np
import pytest
import xxhash
from streaming import MDSWriter
from typer.testing import CliRunner

from data_prep import verify
from data_prep.conversion import convert
from data_prep.manifest import write_manifest
from data_prep.verify import document_hashes
from itt_composer.cli import app

SEQ_LEN = 32


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('verify')
    for domain, word in (('wiki', 'ant <b>'), ('book', 'bee & é')):
        (folder / 'in' / domain).mkdir(parents=True)
        lines = [json.dumps({'text': f'{word} {n} ' * (n % 9)}) + '\n' for n in range(200)]
        (folder / 'in' / domain / 'a.jsonl').write_text(''.join(lines))
    convert(folder / 'in', folder / 'out', seq_len=SEQ_LEN, validation_tokens=2000, workers=1, work_item_bytes=8000)
    return folder / 'out'


@pytest.fixture
def out(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / 'out')


def check(out):
    return verify.verify(out, workers=1)


def test_a_sound_folder_passes_and_gets_a_page(out):
    manifest = json.loads((out / 'manifest.json').read_text())
    expected = {(s, d): c[s]['rows'] for d, c in manifest['domains'].items() for s in ('train', 'validation')}
    assert check(out) == expected
    result = CliRunner().invoke(app, ['verify-data', '--out', str(out), '--workers', '2'])
    assert result.exit_code == 0, result.output
    page = (out / 'samples.html').read_text()
    for piece in (
        'wiki, train',
        'book, validation',
        'ant &lt;b&gt; ',
        'bee &amp; é',
        '<b>&lt;/s&gt;</b><b>&lt;s&gt;</b>',
    ):
        assert piece in page
    assert 'ant <b>' not in page


@pytest.mark.parametrize('which', ['train/wiki/00000/*.mds', 'validation/book/*.mds', 'train/book/00001/*.mds'])
def test_a_flipped_byte_in_a_shard(out, which):
    (path,) = out.glob(which)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = CliRunner().invoke(app, ['verify-data', '--out', str(out), '--workers', '1'])
    assert result.exit_code == 1
    assert f'{path} is damaged' in result.output.replace('\n', '')
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match='bytes, and its index says'):
        check(out)
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        check(out)


@pytest.mark.parametrize('which', ['train/wiki/index.json', 'validation/index.json', 'tokenizer/tokenizer.json'])
def test_a_changed_file(out, which):
    path = out / which
    path.write_bytes(path.read_bytes().replace(b':', b': ', 1))
    with pytest.raises(ValueError, match=f'{which} is not the file that'):
        check(out)
    path.unlink()
    with pytest.raises(ValueError, match=f'{which} is not the file that'):
        check(out)


def test_a_changed_manifest(out):
    text = (out / 'manifest.json').read_text()
    (out / 'manifest.json').write_text(text.replace('"seq_len": 32', '"seq_len": 33'))
    with pytest.raises(ValueError, match=r'manifest\.json was changed'):
        check(out)
    (out / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='no finished conversion'):
        check(out)


def forge(out, rows, split='train', domain='wiki', counts=None):
    """Replace a split's rows by others, with hashes and manifest to match."""
    manifest = json.loads((out / 'manifest.json').read_text())
    shutil.rmtree(out / split / domain)
    with MDSWriter(
        out=str(out / split / domain), columns={'tokens': f'ndarray:uint16:{rows.shape[1]}'}, hashes=['xxh64']
    ) as writer:
        for row in rows:
            writer.write({'tokens': row})
    said = manifest['domains'][domain][split]
    said |= {'rows': len(rows), 'tokens': rows.size + said['dropped_tokens']} | (counts or {})
    write_manifest(out, {key: value for key, value in manifest.items() if key != 'sha256'})


def test_rows_that_are_not_as_the_settings_say(out):
    rows = np.full((4, SEQ_LEN), 7, np.uint16)
    forge(out, rows)
    check(out)
    forge(out, rows, counts={'tokens': 4 * SEQ_LEN + 1})
    with pytest.raises(ValueError, match=r'train/wiki holds \d+ tokens, and the manifest says 129'):
        check(out)
    forge(out, rows, counts={'rows': 5})
    with pytest.raises(ValueError, match='train/wiki holds 4 sequences, and the manifest says 5'):
        check(out)
    rows[2, 5] = 60_000
    forge(out, rows)
    with pytest.raises(ValueError, match='sequence 2 has token 60000, outside the vocabulary of'):
        check(out)
    forge(out, np.full((4, SEQ_LEN - 1), 7, np.uint16))
    with pytest.raises(ValueError, match=r'sequence 0 has shape \(31,\)'):
        check(out)


def test_a_validation_document_among_the_training_ones(out):
    document = [1, *range(100, 110), 2]
    stream = np.array([9, 9, 2, *document, 1, 8, 8, 8], np.uint16)
    validation = np.resize(stream, (1, SEQ_LEN))
    # The same document over the end of a row.
    train = np.array([8] * (SEQ_LEN - 6) + [2, *document] + [8] * (2 * SEQ_LEN), np.uint16)[: 2 * SEQ_LEN]
    forge(out, validation, 'validation', 'book')
    forge(out, train.reshape(2, SEQ_LEN))
    with pytest.raises(ValueError, match=r'train/wiki: 1 validation documents are also trained on'):
        check(out)
    train[SEQ_LEN] += 1
    forge(out, train.reshape(2, SEQ_LEN))
    check(out)


@pytest.mark.parametrize(('bos', 'eos'), [(1, 2), (2, 2)])
def test_document_hashes(bos, eos):
    documents = [[5, 6, 7], [8], [9] * 40]
    tokens = [6, 7, eos] + [token for document in documents for token in (bos, *document, eos)] + [bos, 4, 4]
    found = document_hashes(np.array(tokens, np.uint16), bos, eos)
    whole = [np.array([bos, *document, eos], np.uint16).tobytes() for document in documents]
    assert set(found.tolist()) == {xxhash.xxh3_64_intdigest(data) for data in whole}
