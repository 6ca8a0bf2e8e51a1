"""Read, lay out and write checkpoints."""
