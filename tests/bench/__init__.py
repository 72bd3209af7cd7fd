"""Benchmarks: us, the floor of a copy and every peer that is installed, in one run; `make bench`."""
