"""One call: from a model to a quantized checkpoint."""
