"""softmoe: train, cost and compare mixture-of-experts vision transformers."""
