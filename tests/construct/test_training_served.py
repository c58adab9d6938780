"""A trained tenant answers through the engine as well as its report says."""

import pytest

import hmi_engine as hmi
from hmi_engine.construct.training import TrainingSettings


@pytest.mark.parametrize(
    ("kind", "window", "miss", "pooling"),
    [
        ("bottleneck", 2, "backoff", "cls"),
        ("bottleneck", 3, "exact", "mean"),
        ("lora", 3, "backoff", "cls"),
        ("lora", 2, "exact", "mean"),
    ],
)
def test_served_accuracy_is_the_reported_one(make_store, topic_examples, kind, window, miss, pooling):
    store = make_store(window=window)
    examples = topic_examples(120, seed=1)
    seen = {example.text for example in examples}
    new = [example for example in topic_examples(60, seed=2) if example.text not in seen]
    store.add_domain("topics", sorted(seen))
    settings = TrainingSettings(kind=kind, miss=miss, pooling=pooling, max_epochs=3, learning_rate=5e-3)
    trained = store.train_tenant("topic", examples, domain="topics", test_examples=new, settings=settings)
    with hmi.Engine(store, miss=miss) as engine:
        responses = engine.run([hmi.Request("topic", example.text) for example in new])
    assert all(response.error is None for response in responses)
    correct = [response.label == example.label for response, example in zip(responses, new, strict=True)]
    assert sum(correct) / len(correct) == pytest.approx(trained.report.test.accuracy)
