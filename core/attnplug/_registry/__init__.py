"""What there is: the environment, the hook, plugins found and loaded, and names to implementations.

Nothing here imports torch.
"""
