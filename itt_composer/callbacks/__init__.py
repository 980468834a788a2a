"""Composer callbacks that measure thinking models, one folder each."""
