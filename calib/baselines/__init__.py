"""Rival methods, for comparison in memory only: nothing here is ever exported."""
