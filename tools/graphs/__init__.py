"""What becomes of a model's graphs: captured, dumped, compared, counted, exported."""
