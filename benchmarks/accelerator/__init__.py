"""Does every promise hold on an accelerator? One command, a check a line; see `__main__.py`."""
