"""`tbptt-ckpt explain`."""
