"""How good a checkpoint is, and what its predictions depend on."""
