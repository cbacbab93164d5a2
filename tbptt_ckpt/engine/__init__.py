"""Runs the windows of a sequence: `TBPTT`, one window, evaluation, verification."""
