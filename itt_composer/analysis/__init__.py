"""Measurements and pictures that callbacks and the research code share."""
