"""Beside §11: what the AV needs in order to read v."""
