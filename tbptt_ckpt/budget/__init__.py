"""Keeps a run within its bytes: measures what windows take, plans them, and corrects."""
