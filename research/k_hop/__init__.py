"""The k-hop task: a synthetic text that needs depth."""
