"""hostimagectl: the thin command line client of hostimaged."""

from typing import Final

__version__: Final = "0.1.0"
