"""`tbptt-ckpt plan`."""
