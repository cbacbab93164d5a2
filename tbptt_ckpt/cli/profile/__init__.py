"""`tbptt-ckpt profile`."""
