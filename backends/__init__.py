"""What does the inference. Nothing here imports `sidecar`: a backend can be used, tested and replaced alone."""
