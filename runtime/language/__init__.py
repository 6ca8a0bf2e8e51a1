"""The subset of Python that artifact code may use, its checks, and its loader."""
