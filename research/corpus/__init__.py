"""A corpus of plain text from Debian packages: download, clean, deduplicate, write."""
