"""The user's module: how it is called, its state, and what a step reads and changes besides."""
