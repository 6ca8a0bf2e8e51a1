"""Cut a graph into a chain of subgraphs and write each subgraph as Python source."""
