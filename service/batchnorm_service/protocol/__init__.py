"""The Open Inference Protocol v2: tensors, requests, the exchange of one message, metadata."""
