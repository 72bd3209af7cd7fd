"""HTTP service for frozen batch normalization layers."""
