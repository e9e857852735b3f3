"""The options of a command line: shown, completed, explained, composed, inherited from a checkpoint."""
