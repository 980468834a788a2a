"""Composer callbacks that watch thinking models, one folder each."""
