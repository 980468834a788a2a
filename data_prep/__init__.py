"""Text in, shards out: RedPajama trees become MDS shards of token rows. Knows nothing of the model."""
