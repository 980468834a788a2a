"""The first ten minutes: shards, three small models on the same batches, and a page about them."""
