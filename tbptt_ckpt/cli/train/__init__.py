"""`tbptt-ckpt train`."""
