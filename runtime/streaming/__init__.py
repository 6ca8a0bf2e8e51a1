"""The loop over subgraphs: schedule, activations, checkpoints of progress, and replay after an interruption."""
