"""Counters of requests for each model and process, and their sums over processes."""
