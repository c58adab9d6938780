"""When things move: preparation (search, adapters in memory) and compute of one batch."""
