"""Which Linear modules read the same tensor, and what can make up for scaling that tensor's channels."""
