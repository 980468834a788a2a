"""What a conversion writes: exact accounting, the documents in their order, and validation apart from training."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from common.conversions import BOS, EOS, SEQ_LEN, WORDS, content, run, write_lines, write_source, write_tokenizer
from streaming import LocalDataset

from data_prep import work_item
from data_prep.input import embedded
from data_prep.input.domains import shares
from data_prep.tokens.tokenizer import load_saved


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'bpe')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp('source'))


@pytest.fixture(scope='module')
def undisturbed(source, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    return out, run(source, out, tokenizer, workers=1)


def rows_of(out: Path, split: str, domain: str) -> np.ndarray:
    folder = out / split / domain
    if not folder.is_dir():
        return np.empty((0, SEQ_LEN), np.uint16)
    return rows_at(folder)


def rows_at(folder: Path) -> np.ndarray:
    dataset = LocalDataset(str(folder))
    return np.stack([dataset[i]['tokens'] for i in range(len(dataset))])


def texts_of(source: Path) -> dict[str, list[str]]:
    """Every document of the tree, read in the plainest way."""
    names = {'common_crawl': 'cc', 'c4': 'c4-rp'}
    texts: dict[str, list[str]] = {}
    for path in sorted(source.rglob('*.jsonl*')):
        data = path.read_bytes()
        if path.suffix == '.gz':
            data = gzip.decompress(data)
        elif path.suffix == '.zst':
            data = zstandard.ZstdDecompressor().decompress(data)
        domain = path.relative_to(source).parts[0]
        found = [json.loads(line)['text'] for line in data.decode().splitlines() if line != 'broken']
        texts.setdefault(names.get(domain, domain), []).extend(found)
    return texts


def documents_in(rows: np.ndarray) -> list[tuple[int, ...]]:
    """The token ids of the documents that lie whole within rows laid end to end."""
    stream = rows.reshape(-1).tolist()
    documents, current = [], None
    for token in stream:
        if token == BOS:
            current = []
        elif token == EOS:
            if current is not None:
                documents.append(tuple(current))
            current = None
        elif current is not None:
            current.append(token)
    return documents


def test_every_token_is_accounted_for(source, undisturbed):
    out, manifest = undisturbed
    rust = load_saved(out / 'tokenizer')
    texts = texts_of(source)
    assert manifest['domains'].keys() == texts.keys()
    tokens = {domain: counts['estimated_tokens'] for domain, counts in manifest['domains'].items()}
    proportions = {domain: counts['proportion'] for domain, counts in manifest['domains'].items()}
    assert proportions == pytest.approx(shares(tokens), abs=1e-3)
    for domain, counts in manifest['domains'].items():
        splits = [counts['train'], counts['validation']]
        expected = [[BOS, *rust.encode(text).ids, EOS] for text in texts[domain] if text]
        assert counts['empty_documents'] == texts[domain].count('')
        assert sum(s['documents'] for s in splits) == len(expected)
        assert sum(s['bytes'] for s in splits) == sum(len(text.encode()) for text in texts[domain])
        assert sum(s['tokens'] for s in splits) == sum(map(len, expected))
        for name, count in zip(('train', 'validation'), splits, strict=True):
            rows = rows_of(out, name, domain)
            assert rows.shape == (count['rows'], SEQ_LEN)
            assert rows.dtype == np.uint16
            assert count['tokens'] == rows.size + count['dropped_tokens']
            assert count['dropped_tokens'] < SEQ_LEN


def test_rows_hold_the_documents_in_their_order(source, undisturbed):
    """arxiv is read as several work items; end to end, their rows are the file's documents up to where a row is cut."""
    out, _ = undisturbed
    rust = load_saved(out / 'tokenizer')
    expected = {tuple(rust.encode(text).ids): text for text in texts_of(source)['arxiv']}
    found = documents_in(rows_of(out, 'train', 'arxiv')) + documents_in(rows_of(out, 'validation', 'arxiv'))
    whole = [ids for ids in found if ids in expected]
    assert len(whole) > len(expected) / 2
    # The work items follow one another as the file does; only what filled no sequence of its own stands at the end.
    order = list(expected)
    shards = json.loads((out / 'train/arxiv/index.json').read_text())['shards']
    parts = [Path(shard['raw_data']['basename']).parent.name for shard in shards]
    items = [part for part in parts if part != 'rest']
    assert parts == sorted(parts) and parts[: len(items)] == items  # The rest comes last.
    rows = sum(shard['samples'] for shard in shards[: len(items)])
    positions = [order.index(ids) for ids in documents_in(rows_of(out, 'train', 'arxiv')[:rows]) if ids in expected]
    assert len(items) > 2 and len(positions) > 3 and positions == sorted(positions)
    # One work_item, no copies elsewhere: exactly the documents, in order, up to the last partial row.
    stream = [token for text in texts_of(source)['book'] if text for token in (BOS, *rust.encode(text).ids, EOS)]
    assert rows_of(out, 'train', 'book').reshape(-1).tolist() == stream[: len(stream) // SEQ_LEN * SEQ_LEN]


def test_no_validation_text_is_trained_on(source, undisturbed):
    out, manifest = undisturbed
    train, validation = set(), set()
    for domain, counts in manifest['domains'].items():
        train |= set(documents_in(rows_of(out, 'train', domain)))
        found = documents_in(rows_of(out, 'validation', domain))
        validation |= set(found)
        held_out = counts['validation']
        assert held_out['bytes'] <= 0.1 * (held_out['bytes'] + counts['train']['bytes'])
    # One word or none is too little to tell one document from another's end.
    assert len(validation) > 10
    assert not {ids for ids in validation & train if len(ids) > 8}


def test_copies_in_other_domains_are_on_one_side(tmp_path, tokenizer):
    """All of a small domain's candidates are also in a large domain with a lower threshold, which trains on them."""
    copies = [json.dumps({'text': f'{word} {n} {word}'}) for n, word in enumerate(WORDS * 4)]
    write_lines(tmp_path / 'in/cc/a.jsonl', copies)
    other = [json.dumps({'text': ' '.join(WORDS) + str(n)}) for n in range(3000)]
    write_lines(tmp_path / 'in/stackexchange/a.jsonl', other + copies)
    manifest = run(tmp_path / 'in', tmp_path / 'out', tokenizer, validation_tokens=40_000, work_item_bytes=100_000)
    small, large = manifest['domains']['cc'], manifest['domains']['stackexchange']
    assert large['validation_threshold'] < small['validation_threshold']
    hashes = [work_item.text_hash(json.loads(line)['text'].encode()) for line in copies]
    in_both = sum(h < large['validation_threshold'] for h in hashes)
    assert small['validation']['documents'] == in_both < sum(h < small['validation_threshold'] for h in hashes)
    assert small['train']['documents'] == len(copies) - in_both


def test_the_number_of_workers_changes_nothing(source, tokenizer, undisturbed, tmp_path):
    run(source, tmp_path / 'out', tokenizer, workers=3)
    assert content(tmp_path / 'out') == content(undisturbed[0])


def test_domains_without_enough_text(tmp_path, tokenizer):
    write_lines(tmp_path / 'in/wiki/a.jsonl', ['{"text": "%s"}' % ('the of ' * 100)] * 5)
    write_lines(tmp_path / 'in/short/a.jsonl', ['{"text": "the of"}'])
    with pytest.raises(ValueError, match='domain short has 6 bytes of text, less than a sequence of 64 tokens'):
        run(tmp_path / 'in', tmp_path / 'out', tokenizer)
    write_lines(tmp_path / 'in/short/a.jsonl', [json.dumps({'text': ' '.join(WORDS[:20])})])
    with pytest.raises(ValueError, match=r'domain short has \d+ training tokens, less than a sequence of 64'):
        run(tmp_path / 'in', tmp_path / 'third', tokenizer)
    write_lines(tmp_path / 'in/short/a.jsonl', ['nothing', '', '{}'])
    with pytest.raises(
        ValueError, match=r'short is empty: no line of .*a\.jsonl has a document; the first is bad: not JSON'
    ):
        run(tmp_path / 'in', tmp_path / 'other', tokenizer)


@pytest.mark.parametrize('option', ['seq_len', 'workers', 'validation_tokens', 'max_bad_lines'])
def test_settings_out_of_range(tmp_path, option):
    name = option.replace('_', '-')
    with pytest.raises(ValueError, match=rf'^--{name}: expected at least [012], got -1'):
        run(tmp_path, tmp_path / 'out', None, **{option: -1})
    assert not (tmp_path / 'out').exists()


def test_without_source_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, '_DOMAIN_BYTES', 60_000)
    manifest = run(None, tmp_path / 'out', None, validation_tokens=20_000)
    assert manifest['domains'].keys() == {'sources', 'docstrings', 'descriptions'}
    assert not manifest['bad_lines']
    assert manifest['tokenizer']['vocab_size'] == 4096
    assert run(None, tmp_path / 'out', None, validation_tokens=20_000) == manifest
    rust = load_saved(tmp_path / 'out/tokenizer')
    text = rust.decode(rows_of(tmp_path / 'out', 'train', 'sources').reshape(-1).tolist())
    assert 'import' in text
    embedded.write_corpus(tmp_path / 'again')
    assert content(tmp_path / 'again') == content(tmp_path / 'out/source')


def test_llama_accounting_against_sentencepiece(shared, llama, tmp_path):
    from sentencepiece import SentencePieceProcessor

    oracle = SentencePieceProcessor(model_file=str(shared / 'data/llama_tokenizer/tokenizer.model'))
    for domain in ('cc', 'wiki'):
        for file in (shared / 'data/redpajama_sample' / domain).iterdir():
            write_lines(tmp_path / 'in' / domain / file.name, file.read_text().splitlines()[:40])
    manifest = run(tmp_path / 'in', tmp_path / 'out', str(llama), work_item_bytes=200_000)
    for domain, texts in texts_of(tmp_path / 'in').items():
        counts = manifest['domains'][domain]
        rows = [rows_of(tmp_path / 'out', name, domain) for name in ('train', 'validation')]
        dropped = sum(counts[name]['dropped_tokens'] for name in ('train', 'validation'))
        expected = [token for text in texts for token in (BOS, *oracle.encode(text), EOS)]
        assert sum(r.size for r in rows) + dropped == len(expected)
        # Counts of all tokens but the dropped ones: nothing is lost, nothing is there twice.
        ours = np.bincount(np.concatenate([r.reshape(-1) for r in rows]), minlength=32000)
        theirs = np.bincount(expected, minlength=32000)
        assert (ours <= theirs).all()
