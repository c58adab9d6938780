"""Who goes next: requests to batches. Knows no tensors."""
