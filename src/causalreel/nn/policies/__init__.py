"""Context policies: what stays of the past, what a chunk sees of it, and at which positions. One file each."""
