"""`python -m runtime`."""

from __future__ import annotations

import sys

from runtime.cli import imports as lean_imports
from runtime.cli.app import main

if __name__ == "__main__":
    lean_imports.allow()
    sys.exit(main())
