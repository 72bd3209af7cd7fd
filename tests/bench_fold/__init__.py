"""What folding gains in ONNX Runtime: whole networks as they are and folded; `make bench-fold`."""
