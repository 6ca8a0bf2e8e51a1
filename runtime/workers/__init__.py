"""The processes that share one run: their messages, the division of work, and what happens when one of them fails."""
