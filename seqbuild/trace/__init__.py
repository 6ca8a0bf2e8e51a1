"""Record a model's forward as a graph of whole steps."""
