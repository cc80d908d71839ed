"""The checks, one module for each group. Adding one: a decorated function whose docstring says what it proves."""
