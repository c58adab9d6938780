"""Adapters trained elsewhere: how they come in and how they go out."""

from hmi_engine.interop.peft import ImportedTenant, read_peft, write_peft

__all__ = ["ImportedTenant", "read_peft", "write_peft"]
