"""HMI: serves thousands of fine-tuned transformer models from one machine by storing what they share once.

Start with :class:`Store` (what is kept) and :class:`Engine` (what answers); every error is an
:class:`HmiError`.
"""

from importlib.metadata import version

from hmi_engine import errors
from hmi_engine.async_engine import AsyncEngine
from hmi_engine.construct.joint_training import TenantExamples
from hmi_engine.construct.model_card import ModelCard
from hmi_engine.construct.training import SearchSpace, TrainedTenant, TrainingReport, TrainingSettings
from hmi_engine.engine import Engine, EngineStatistics
from hmi_engine.errors import HmiError
from hmi_engine.evaluation import Evaluation, evaluate_tenant
from hmi_engine.knowledge.adapters import (
    Adapter,
    BiasBlock,
    BottleneckBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    random_adapter,
)
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.corpus_examples import stream_examples, stream_task_examples
from hmi_engine.knowledge.examples import (
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
)
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    GenerationHead,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.memory.memory_budget import MemoryBudget
from hmi_engine.request import Request, Response, Tag, TextPiece, Timing, Usage
from hmi_engine.sampling import Sampling
from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.serving_options import EngineOptions
from hmi_engine.store import Store

__version__ = version("hmi")

__all__ = [
    "Adapter",
    "AsyncEngine",
    "BiasBlock",
    "BottleneckBlock",
    "ClassificationHead",
    "DenseLayer",
    "EmbeddingHead",
    "Engine",
    "EngineOptions",
    "EngineStatistics",
    "Evaluation",
    "Example",
    "GenerationHead",
    "HmiError",
    "LoraBlock",
    "MemoryBudget",
    "ModelCard",
    "MultiLabelExample",
    "NewTenant",
    "PairExample",
    "QueueLimits",
    "RegressionExample",
    "RegressionHead",
    "Request",
    "Response",
    "Sampling",
    "ScaleBlock",
    "ScoredPairExample",
    "SearchSpace",
    "Site",
    "Store",
    "Tag",
    "TaggedExample",
    "TenantExamples",
    "TenantLimits",
    "TextPiece",
    "Timing",
    "TokenClassificationHead",
    "TrainedTenant",
    "TrainingReport",
    "TrainingSettings",
    "Usage",
    "errors",
    "evaluate_tenant",
    "random_adapter",
    "stream_examples",
    "stream_task_examples",
]
