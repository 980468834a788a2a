"""Domains of RedPajama: their names and shares.

The names of the LLM-Shearing sample and those of the 1T release both map to LLM-Shearing's; any other name is a domain
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

# LLM-Shearing's proportions of training tokens for RedPajama, the paper's recipe.
PROPORTIONS = {
    'cc': 0.67,
    'c4-rp': 0.15,
    'github': 0.045,
    'wiki': 0.045,
    'book': 0.045,
    'arxiv': 0.025,
    'stackexchange': 0.02,
}
ALIASES = {'common_crawl': 'cc', 'commoncrawl': 'cc', 'c4': 'c4-rp', 'wikipedia': 'wiki', 'books': 'book'}


def missing_domains(domains: Mapping[str, object]) -> list[str]:
    """RedPajama domains that a source with at least one of them lacks."""
    if not any(name in PROPORTIONS for name in domains):
        return []
    return [name for name in PROPORTIONS if name not in domains]


def shares(tokens: Mapping[str, float]) -> dict[str, float]:
    """Each domain's share of a token budget, given the domains' sizes in tokens. The shares sum to 1.

    RedPajama's domains together get what they have by size, and divide it by LLM-Shearing's proportions; any other
    domain gets its share by size.
    """
    total = sum(tokens.values())
    known = {name: PROPORTIONS[name] for name in tokens if name in PROPORTIONS}
    known_by_size = sum(tokens[name] for name in known) / total
    return {
        name: known_by_size * known[name] / sum(known.values()) if name in known else tokens[name] / total
        for name in tokens
    }


def too_short(domain: str, held: str, seq_len: int) -> str:
    """What to tell a user whose domain does not fill one training sequence."""
    return (
        f'--source: domain {domain} has {held}, less than a sequence of {seq_len} tokens; '
        'lower --seq-len, or leave the domain out'
    )
