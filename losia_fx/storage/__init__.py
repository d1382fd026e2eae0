"""Files: replaced whole, checksummed, and those of a transformers checkpoint."""
