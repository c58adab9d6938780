"""``hmi demo``: the whole system on real text and real weights, measured beside its peers in the same run."""

from hmi_engine.demo.result import DemoResult
from hmi_engine.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
