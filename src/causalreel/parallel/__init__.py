"""Functions applied to a finished model: compilation and CUDA graphs. None of them edits nn."""
