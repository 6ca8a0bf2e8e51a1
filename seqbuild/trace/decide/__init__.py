"""Answer decisions in the model's code that depend on values."""
