"""Find the model to compile: its source, its code, and the names of its checkpoint's tensors."""
