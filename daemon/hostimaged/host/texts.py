"""Text of files that others wrote, as it can be shown and sent; unlike ``errors.printable`` it keeps all."""

from __future__ import annotations


def shown(text: str | bytes) -> str:
    """``text`` with escapes for what is not printable: controls, surrogates, zero bytes, bad UTF-8."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
