"""What a recipe does to the modules of a subgraph: measure their inputs, rescale them, round them."""
