"""Other systems, timed on the same machine doing the same work."""
