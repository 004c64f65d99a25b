"""hostimagectl: the thin command line client of hostimaged."""
