"""Load the tensors of a checkpoint into the module tree, one subgraph at a time."""
