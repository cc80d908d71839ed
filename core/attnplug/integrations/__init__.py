"""Bridges into libraries that choose their attention by name.

Nothing here is imported by `attnplug` itself, and nothing happens at import: each bridge has a function that
a program calls, and the library that it serves is imported then.
"""
