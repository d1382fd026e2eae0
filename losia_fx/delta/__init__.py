"""What training changed, as a file: written, read, applied, and exported as a LoRA adapter."""
