"""The tasks that tenants are trained for, each in one file that says all of it.

A new task is a file here, an entry of :data:`OBJECTIVES`, its examples in
:mod:`hmi_engine.knowledge.examples`, and a head where no kind of head serves it.
"""

from hmi_engine.construct.objectives.classification import ClassificationObjective
from hmi_engine.construct.objectives.embedding import EmbeddingObjective
from hmi_engine.construct.objectives.multi_label import MultiLabelObjective
from hmi_engine.construct.objectives.objective import Objective, TrainableHead
from hmi_engine.construct.objectives.regression import RegressionObjective
from hmi_engine.construct.objectives.token_classification import TokenClassificationObjective
from hmi_engine.knowledge.examples import Task

__all__ = ["OBJECTIVES", "Objective", "TrainableHead"]

OBJECTIVES: dict[Task, type[Objective]] = {
    "classification": ClassificationObjective,
    "multi_label": MultiLabelObjective,
    "token_classification": TokenClassificationObjective,
    "embedding": EmbeddingObjective,
    "regression": RegressionObjective,
}
"""Every task's objective by its name."""
