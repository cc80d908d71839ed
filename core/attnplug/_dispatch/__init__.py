"""From a call to a kernel: the decision, where it is kept, eager and traced calls, and what is recorded of them."""
