"""The suite. A package, so that the repository root comes first on sys.path and our `ops` wins over any other."""
