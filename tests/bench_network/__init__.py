"""Times whole networks with PyTorch's batch norm layers and with ours; `make bench-network`."""
