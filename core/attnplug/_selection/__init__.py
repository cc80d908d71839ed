"""Who decides: what a thread and the process prefer.

Nothing here imports torch.
"""
