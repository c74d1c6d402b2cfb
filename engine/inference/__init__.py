"""Running a packed model: the KV cache, generation, whole-sequence outputs."""
