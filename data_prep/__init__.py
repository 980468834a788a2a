"""Text in, shards out: RedPajama trees become MDS shards of token sequences. Knows nothing of the model."""
