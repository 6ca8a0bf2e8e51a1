"""The provenance of a quantized checkpoint: recipe.yaml, README.md and seqbuild.json beside its tensors."""
