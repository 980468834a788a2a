"""Composer checkpoints as Hugging Face folders."""
