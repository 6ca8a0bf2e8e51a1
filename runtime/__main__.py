"""`python -m runtime`."""

from __future__ import annotations

import sys

from runtime.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
