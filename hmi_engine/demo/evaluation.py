"""Held-out accuracy of tenants, as an engine answers."""

from __future__ import annotations

from hmi_engine.demo.tasks import Task
from hmi_engine.engine import Engine
from hmi_engine.request import Request

__all__ = ["held_out_accuracy"]


def held_out_accuracy(engine: Engine, task: Task) -> float:
    """Share of a task's held-out texts that its tenant labels rightly.

    Raises:
        HmiError: a request failed; its own error.
    """
    responses = engine.run([Request(task.name, example.text) for example in task.test])
    for response in responses:
        if response.error is not None:
            raise response.error
    correct = sum(
        response.label == example.label for response, example in zip(responses, task.test, strict=True)
    )
    return correct / len(task.test)
