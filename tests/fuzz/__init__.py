"""A differential fuzz: random modules, windows and options against a plain loop over torch."""
