"""Learning rate as a pure function of progress in tokens; one file per schedule."""
