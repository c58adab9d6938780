"""Engines simulated by discrete events: the real scheduler and eviction, and stages that only take time."""
