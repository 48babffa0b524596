"""Functions applied to a finished model: compilation now, sharding and sequence parallelism later. None of them edits nn."""
