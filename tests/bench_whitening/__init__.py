"""What whitening costs: batch norm, whitening by each method, other libraries; `make bench-whitening`."""
