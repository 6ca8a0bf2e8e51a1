"""Statistics of a model's inputs on disk: measured once, and used by the solves of many recipes."""
