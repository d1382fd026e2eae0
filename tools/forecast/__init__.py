"""What a step will hold and cost, and what it did."""
