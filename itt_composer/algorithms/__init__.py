"""Composer algorithms for thinking models, one folder each."""
