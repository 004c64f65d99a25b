"""hostimaged: owner of a composefs repository and of the OS deployments of an image-based host."""

from typing import Final

__version__: Final = "0.1.0"
