"""What users set: scopes, bindings, activation, the routing of PyTorch's function; and what they ask."""
