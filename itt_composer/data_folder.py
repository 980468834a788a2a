"""What ``make data`` and training both need to know of a data folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, or of a part of it, without its key ``sha256``."""
    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id plus one; not the number of tokens, as a vocabulary may have holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
