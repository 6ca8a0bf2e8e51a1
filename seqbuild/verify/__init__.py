"""The proof that a chain computes what the model computes."""
