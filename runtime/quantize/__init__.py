"""Apply a recipe to the modules of a subgraph: measure their inputs, rescale and round their weights."""
