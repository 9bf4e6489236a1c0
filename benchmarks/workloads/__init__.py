"""Training problems with little noise, for the comparison; those with more are in examples/."""
