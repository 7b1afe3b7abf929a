"""Whether a value from YAML or JSON is of a type."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from vimamba.kinds import fits

WHATEVER = {  # of a text or of a number: type, what fits, what does not
    "whole": (int, [0, -3], [True, 1.0, "1", None]),
    "number": (float, [1, 0.5], [True, float("nan"), float("inf"), 10**400, "x", None, [1.0]]),
    "text": (str, ["", "a"], [1, None, ["a"]]),
    "truth": (bool, [True], [0, "true"]),
    "or": (int | None, [1, None], ["1", 1.5]),
    "choice": (Literal["a", "b"], ["a"], ["c", [], None]),
    "pair": (tuple[int, int], [[1, 2], (1, 2)], [[1], [1, 2, 3], 1, "12", [1, 2.5]]),
    "tuple of any length": (tuple[int, ...], [[], [1, 2, 3]], [["a"], 1]),
    "bare tuple": (tuple, [[], [1, "a"]], [1, "a"]),
    "list": (list[str], [[], ["a"]], ["a", [1]]),
    "sequence or text": (Sequence[str] | str, ["a", ["a", "b"]], [[1], 1]),
    "of sequences": (Sequence[Sequence[str]], [[["a"], ["b", "c"]]], [["a"], [[1]]]),
    "mapping": (dict[str, Any], [{}], [[], "a"]),
    "anything": (Any, [None, 1, "a", []], []),
    "code": (Callable[..., int], [], ["print", 1]),
}


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize(("kind", "good", "bad"), WHATEVER.values(), ids=WHATEVER)
def test_a_value_is_of_a_type(kind, good, bad, texts):
    for value in good:
        assert fits(kind, value, texts), value
    for value in bad:
        assert not fits(kind, value, texts), value


@pytest.mark.parametrize(
    ("kind", "value"),
    [(float, "1e-3"), (float | None, "1e-3"), (tuple[float, float], ["1e-3", 1]), (list[float], ["2"])],
)
def test_yaml_reads_some_numbers_as_texts_and_json_does_not(kind, value):
    assert fits(kind, value)
    assert not fits(kind, value, texts=False)
