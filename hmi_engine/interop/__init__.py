"""Adapters trained elsewhere: how they come in and how they go out."""

from hmi_engine.interop.adapter_folder import FolderFormat, detect_format
from hmi_engine.interop.adapterhub import read_adapterhub
from hmi_engine.interop.adapterhub_export import write_adapterhub
from hmi_engine.interop.adapterhub_heads import read_head
from hmi_engine.interop.imported_tenant import PROBLEM_TYPES, ImportedTenant, LowerLayers, ProblemType
from hmi_engine.interop.peft import read_peft
from hmi_engine.interop.peft_export import write_peft

__all__ = [
    "PROBLEM_TYPES",
    "FolderFormat",
    "ImportedTenant",
    "LowerLayers",
    "ProblemType",
    "detect_format",
    "read_adapterhub",
    "read_head",
    "read_peft",
    "write_adapterhub",
    "write_peft",
]
