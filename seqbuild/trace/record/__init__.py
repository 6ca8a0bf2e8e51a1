"""Record the operations of a forward as graph nodes."""
