"""Training: a loop that walks features, each one file with named hooks that do nothing by default."""
