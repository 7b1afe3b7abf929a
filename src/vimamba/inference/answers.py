"""What is said of an image in JSON: by `vimamba predict --json` and by a server alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from vimamba.errors import UserError
from vimamba.inference.predictor import Predictor
from vimamba.tasks.results import Detections

MIN_SCORE = 0.5
OBJECTS, CLASSES = 100, 5  # shown where nothing is asked for


class Asked(NamedTuple):
    """How much is to be said.

    Args:
        top: classes, or objects, of an image.
        min_score: objects of which the model is less sure are left out.
    """

    top: int
    min_score: float

    @classmethod
    def by(cls, predictor: Predictor, top: int | None = None, min_score: float = MIN_SCORE) -> Asked:
        """With what suits the task where nothing was asked for."""
        if issubclass(predictor.task.result, Detections):
            return cls(top or OBJECTS, min_score)
        return cls(min(top or CLASSES, len(predictor.class_names)), min_score)

    def of(self, answer: Any) -> Any:
        """An answer without the objects that are not sure enough."""
        return answer.above(self.min_score) if isinstance(answer, Detections) else answer

    def body(self, answer: Any) -> dict[str, Any]:
        """An answer, or why there is none."""
        return {"error": str(answer)} if isinstance(answer, UserError) else answer.to_dict(self.top)
