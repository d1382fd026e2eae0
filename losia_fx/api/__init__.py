"""The public functions that put subnets onto a model, take them off and show them."""
