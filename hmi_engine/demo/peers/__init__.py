"""Other ways of serving many tenants, behind one small interface, so that all answer the same stream."""

from hmi_engine.demo.peers.hmi import HmiPeer
from hmi_engine.demo.peers.interface import Peer, ServedTenant, answer_stream
from hmi_engine.demo.peers.peft import PeftMixedBatch, PeftOneAtATime
from hmi_engine.demo.peers.separate_models import OneModelPerTenant
from hmi_engine.demo.peers.transformers_batch import tune

__all__ = [
    "HmiPeer",
    "OneModelPerTenant",
    "Peer",
    "PeftMixedBatch",
    "PeftOneAtATime",
    "ServedTenant",
    "answer_stream",
    "tune",
]
