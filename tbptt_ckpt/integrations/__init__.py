"""Training by windows inside of other libraries: a module for each, which imports its library."""

__all__: list[str] = []
