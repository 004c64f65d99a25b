"""Entry point of ``hostimagectl``."""

from __future__ import annotations

import sys

from hostimagectl.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
