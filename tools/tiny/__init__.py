"""Any architecture, tiny and random, with a batch for it."""
