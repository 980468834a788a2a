"""Which documents are for validation: thresholds against the sizes they must give."""

import hashlib
import json

import numpy as np
import pytest

from data_prep import split
from data_prep.input.domains import PROPORTIONS, missing_domains, shares
from data_prep.input.sources import open_source
from data_prep.split import Census, text_hash, thresholds


def census(documents, mean_bytes, seed, complete=True, scale=1.0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 2 * mean_bytes, documents)
    hashes = rng.integers(0, 2**64, documents, dtype=np.uint64)
    return Census(hashes, sizes, tokens_per_byte=0.25, text_bytes=scale * sizes.sum(), complete=complete)


def held_out_bytes(census, threshold):
    return sum(int(size) for hashed, size in zip(census.hashes, census.sizes, strict=True) if int(hashed) < threshold)


def test_thresholds_hold_out_the_shares_of_the_recipe():
    censuses = {name: census(20_000, 1000, seed) for seed, name in enumerate(PROPORTIONS)}
    threshold = thresholds(censuses, validation_tokens=200_000)
    for name, domain in censuses.items():
        wanted = PROPORTIONS[name] * 200_000 / 0.25
        assert abs(held_out_bytes(domain, threshold[name]) - wanted) <= 1000, name


def test_equal_shares_hold_out_the_same_of_each_domain():
    censuses = {'cc': census(20_000, 1000, 0), 'wiki': census(20_000, 500, 1), 'notes': census(9000, 1000, 2)}
    threshold = thresholds(censuses, 300_000, 'equal')
    for name, domain in censuses.items():
        assert abs(held_out_bytes(domain, threshold[name]) - 100_000 / 0.25) <= 1000, name


@pytest.mark.parametrize('documents', [1, 2, 20, 1000])
def test_no_domain_gives_more_than_a_tenth(documents):
    for seed in range(30):
        domain = census(documents, 5000, seed)
        threshold = thresholds({'cc': domain}, validation_tokens=10**12)['cc']
        assert held_out_bytes(domain, threshold) <= 0.1 * domain.text_bytes
        if documents == 1000:
            assert held_out_bytes(domain, threshold) >= 0.09 * domain.text_bytes


def test_large_domain_gets_its_share_from_an_estimate():
    domain = census(50_000, 1000, 0, complete=False, scale=100.0)
    wanted = 0.02 * domain.tokens
    threshold = thresholds({'cc': domain}, validation_tokens=int(wanted))['cc']
    assert held_out_bytes(domain, threshold) * 100 * 0.25 == pytest.approx(wanted, rel=0.1)


def test_no_validation_tokens_hold_out_nothing():
    assert thresholds({'cc': census(50, 10, 0), 'x': census(50, 10, 1, complete=False)}, 0) == {'cc': 0, 'x': 0}


def test_equal_texts_stand_together():
    hashes = np.array([5] * 4 + list(range(10, 46)), np.uint64)
    domain = Census(hashes, np.full(40, 10), 0.25, 400.0, True)
    # Four equal texts are a tenth of the domain: all of them fit, three of them alone cannot.
    assert thresholds({'x': domain}, 10**9)['x'] == 6
    assert thresholds({'x': Census(hashes[:35], domain.sizes[:35], 0.25, 350.0, True)}, 10**9)['x'] == 0


def test_hash_is_even_and_of_the_text_alone():
    values = [text_hash(f'document {n}'.encode()) for n in range(4000)]
    assert len(set(values)) == 4000
    assert 0.08 < sum(v < 2**64 // 10 for v in values) / 4000 < 0.12
    assert text_hash(b'document 7') == values[7]


def test_census_of_a_large_domain_estimates_its_size(tmp_path, monkeypatch):
    class OneTokenAByte:
        def ids(self, texts):
            return [text.encode() for text in texts]

    (tmp_path / 'cc').mkdir()
    total = 0
    for n in range(40):
        texts = [hashlib.sha256(f'{n} {i}'.encode()).hexdigest() * (1 + i % 5) for i in range(30)]
        total += sum(map(len, texts))
        (tmp_path / f'cc/{n:02}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    files = open_source(tmp_path).files
    full = split.take_census(tmp_path, files, 'text', OneTokenAByte())
    assert full.complete
    assert full.text_bytes == full.tokens == total
    monkeypatch.setattr(split, 'FULL_CENSUS_BYTES', 1000)
    monkeypatch.setattr(split, 'CENSUS_FILE_BYTES', 3000)
    part = split.take_census(tmp_path, files, 'text', OneTokenAByte())
    assert not part.complete
    assert len(part.hashes) < len(full.hashes) / 2
    assert part.tokens == pytest.approx(total, rel=0.2)


def test_names_of_both_releases_are_the_same_domains(tmp_path):
    names = {
        'common_crawl/2019-30/en': 'cc', 'c4': 'c4-rp', 'github': 'github', 'wikipedia': 'wiki', 'books': 'book',
        'arxiv': 'arxiv', 'stackexchange': 'stackexchange', 'my notes': 'my notes',
    }  # fmt: skip
    for folder in names:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'a.jsonl').write_text('{"text": "x"}\n')
        (tmp_path / folder / 'README.md').write_text('not data')
    files = open_source(tmp_path).files
    assert {file.path.removesuffix('/a.jsonl'): file.domain for file in files} == names
    assert missing_domains(dict.fromkeys(names.values())) == []
    assert missing_domains({'wiki': 0, 'own': 0}) == [n for n in PROPORTIONS if n != 'wiki']
    (tmp_path / 'cc').mkdir()
    (tmp_path / 'cc' / 'b.jsonl').write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match='both domain cc'):
        open_source(tmp_path)


def test_shares():
    assert shares(dict.fromkeys(PROPORTIONS, 1.0)) == pytest.approx(PROPORTIONS)
    assert shares({'a': 1.0, 'b': 3.0}) == {'a': 0.25, 'b': 0.75}
    # Half of the tokens are RedPajama's, and are divided by its proportions.
    mixed = shares({'cc': 1.0, 'c4-rp': 4.0, 'own': 5.0})
    assert mixed == pytest.approx({'cc': 0.5 * 67 / 82, 'c4-rp': 0.5 * 15 / 82, 'own': 0.5})


def test_source_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match='not a folder'):
        open_source(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='no domain folders'):
        open_source(tmp_path)
    (tmp_path / 'wiki').mkdir()
    with pytest.raises(ValueError, match='wiki is empty'):
        open_source(tmp_path)
    (tmp_path / 'wiki/a.jsonl').touch()
    with pytest.raises(ValueError, match='wiki is empty'):
        open_source(tmp_path)
