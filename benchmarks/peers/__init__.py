"""The systems that HMI is measured beside.

Those that serve tenants are the demo's (``hmi_engine.demo.peers``); those of single parts live here.
"""

from benchmarks.peers.gathered_plot import GatheredPlot
from benchmarks.peers.numba_plot import NumbaPlot
from benchmarks.peers.torch_matmul import DenseAdapter, LoopedAdapters
from hmi_engine.demo.peers import OneModelPerTenant, Peer, PeftMixedBatch, PeftOneAtATime

__all__ = [
    "DenseAdapter",
    "GatheredPlot",
    "LoopedAdapters",
    "NumbaPlot",
    "OneModelPerTenant",
    "Peer",
    "PeftMixedBatch",
    "PeftOneAtATime",
]
