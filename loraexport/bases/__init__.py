"""One module per kind of base."""
