"""`softmoe doctor`: what is wrong with a run, from its files."""
