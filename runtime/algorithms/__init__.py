"""One algorithm, one file: pure functions of tensors."""
