"""Pages about runs and artifacts: one HTML file each, which needs no network."""
