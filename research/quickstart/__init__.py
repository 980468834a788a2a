"""The first ten minutes: shards, a plain, a Loop x4 and an ITT x4 model on the same batches, and a page about them."""
