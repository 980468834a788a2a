"""Sources of text: files, formats, readers, domains."""
