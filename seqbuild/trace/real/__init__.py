"""Execute parts of a model on real values during a trace."""
