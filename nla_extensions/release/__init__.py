"""Verbalizers that ship, the ``NLA`` class that reads with them, and releases to a hub."""
