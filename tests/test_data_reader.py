"""Documents out of files, against plain reading of the same bytes."""

import gzip
import json
import lzma

import pytest
import zstandard

from data_prep.input.reader import BadLine, Document, JsonLines

LINES = [
    b'{"text": "one"}',
    b'{"text": "cut off',
    b'',
    b'{"text": "two \\u00e9\\n"}',
    b'{"other": 1}',
    b'{"text": "\xff"}',
    b'{"text": null}',
    b'["text"]',
    b'{"text": "\\ud800"}',
    b'{"text": "nul \\u0000"}',
    b'{"text": ""}',
    b'{"text": "x", "n": ' + b'1' * 5000 + b'}',
]
TEXTS = ['one', 'two é\n', 'nul \0', '']
BAD = {
    2: 'not JSON',
    5: "no text field 'text'; the fields are other; ",
    6: 'invalid UTF-8',
    7: 'NoneType',
    8: 'not an object with fields, but list',
    9: 'not Unicode',
    12: 'not JSON',
}


PACKS = {'gz': gzip.compress, 'zst': zstandard.ZstdCompressor().compress, 'xz': lzma.compress}


def read(path, start=0, end=None, text_field='text'):
    with JsonLines(path, text_field, start, end) as lines:
        items = list(lines)
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, BadLine)]


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.jsonl.xz'])
@pytest.mark.parametrize('newline_at_end', [True, False])
def test_documents_and_bad_lines(tmp_path, suffix, newline_at_end):
    data = b'\n'.join(LINES) + b'\n' * newline_at_end
    pack = PACKS.get(suffix[7:], bytes)
    path = tmp_path / f'a{suffix}'
    path.write_bytes(pack(data))
    documents, bad = read(path)
    assert [d.text for d in documents] == TEXTS
    assert [d.utf8 for d in documents] == [text.encode() for text in TEXTS]
    assert {b.line for b in bad} == BAD.keys()
    assert all(BAD[b.line] in b.reason for b in bad)


def test_parts_give_every_line_once(tmp_path):
    path = tmp_path / 'a.jsonl'
    texts = ['x' * n for n in (0, 1, 7, 30, 2, 2, 50)]
    lines = [json.dumps({'text': text}).encode() + b'\n' for text in texts]
    lines.insert(4, b'bad\n')
    data = b''.join(lines)
    path.write_bytes(data)
    for size in range(1, len(data) + 2):
        documents, bad = [], []
        for start in range(0, len(data), size):
            part = read(path, start, min(start + size, len(data)))
            documents += part[0]
            bad += part[1]
        assert [d.text for d in documents] == texts, size
        assert [b.line for b in bad] == [5], size


def test_several_zstd_frames(tmp_path):
    path = tmp_path / 'a.jsonl.zst'
    pack = zstandard.ZstdCompressor().compress
    path.write_bytes(pack(b'{"text": "a"}\n{"text"') + pack(b': "b"}\n'))
    assert [d.text for d in read(path)[0]] == ['a', 'b']


@pytest.mark.parametrize('suffix', PACKS)
def test_damaged_compression_names_the_file(tmp_path, suffix):
    path = tmp_path / f'broken.jsonl.{suffix}'
    data = PACKS[suffix](b''.join(b'{"text": "%d"}\n' % (n * 7919 % 10007) for n in range(5000)))
    path.write_bytes(data[:1000] + bytes(200) + data[1200:])
    with pytest.raises(ValueError, match=r'broken\.jsonl.*damaged after line \d+'):
        read(path)


@pytest.mark.parametrize('suffix', PACKS)
@pytest.mark.parametrize('whole_frames', [0, 1])
def test_cut_off_compression_is_no_shorter_file(tmp_path, suffix, whole_frames):
    path = tmp_path / f'cut.jsonl.{suffix}'
    data = PACKS[suffix](b'{"text": "a"}\n' * 5000)
    for cut in (1, 20, len(data) - 5):
        path.write_bytes(data * whole_frames + data[:-cut])
        with pytest.raises(ValueError, match=r'cut\.jsonl.*cut off'):
            read(path)


def test_text_in_another_field(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"raw_content": "x", "text": 1}\n{"text": "y"}\n')
    documents, bad = read(path, text_field='raw_content')
    assert [d.text for d in documents] == ['x']
    assert [(b.line, b.reason.split(';')[1]) for b in bad] == [(2, ' the fields are text')]
