"""The machine a run uses: memory, devices, files."""
