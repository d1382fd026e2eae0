"""What a model is made of: which parameter is what kind of weight, the repeated blocks, the role of each. No graph."""
