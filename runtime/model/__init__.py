"""Build a model's module tree without its weights."""
