"""What a model costs: by formula, by counter, in memory, on the clock."""
