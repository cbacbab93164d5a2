"""The command line, `tbptt-ckpt`; nothing else in the package imports it."""
