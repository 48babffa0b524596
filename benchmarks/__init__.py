"""Benchmarks: programs that measure, apart from the package."""
