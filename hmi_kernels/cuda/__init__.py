"""The backend ``cuda``: from checked tensors to the addresses that the compiled kernels take."""
