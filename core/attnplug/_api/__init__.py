"""The two attention calls."""
