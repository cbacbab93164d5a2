"""The example that the commands run: a byte-level language model on text."""
