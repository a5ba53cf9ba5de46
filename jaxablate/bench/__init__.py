"""Benchmarks: of the kernels, and of a study's train step."""
