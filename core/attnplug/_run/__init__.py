"""A chosen kernel run: as autograd, as an operator, and under the transforms of `torch.func`."""
