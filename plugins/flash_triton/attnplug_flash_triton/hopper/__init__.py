"""Kernels for Hopper (compute capability 9.0), which run its tensor cores and copies asynchronously.

They take the place of the plain kernels for the calls that `choose` lists; every other call runs on the plain ones.
"""
