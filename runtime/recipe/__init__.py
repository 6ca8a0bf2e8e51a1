"""Read recipes: which modules are quantized, to which scheme, by which algorithm."""
