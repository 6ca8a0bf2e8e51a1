"""Sample inputs for a trace, derived from the model's signature and config."""
