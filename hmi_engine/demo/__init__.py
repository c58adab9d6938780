"""``hmi demo``: the whole system on real text and real weights, measured beside its peers in the same run."""
