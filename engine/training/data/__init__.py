"""Training data: files to rows, rows to tokens, tokens to batches whose order and masks follow from a seed alone."""
