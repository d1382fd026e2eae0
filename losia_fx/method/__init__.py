"""The paper's mathematics: tensors in, tensors out. Nothing here knows a model, a graph or an optimizer."""
