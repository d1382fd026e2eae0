"""The ``torch.library`` operators of a rewritten graph: products with the gradient of a subnet, and localization."""
