"""Of which rows the codebooks are trained."""

import pytest

from hmi_engine.construct.materialise import _evenly_spread


@pytest.mark.parametrize("length", [0, 1, 2, 65_536, (1 << 24) + 4, 123_456_789, 1 << 31])
def test_rows_to_train_codebooks_of_lie_evenly_over_all(length: int) -> None:
    places = _evenly_spread(length, 65_536)
    assert len(places) == min(length, 65_536)
    if length > 1:
        assert (places[0], places[-1]) == (0, length - 1)
        steps = places.diff()
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1
