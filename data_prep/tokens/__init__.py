"""From text to token ids: tokenizer, BPE boundaries, word cache."""
