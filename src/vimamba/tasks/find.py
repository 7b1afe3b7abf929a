"""The tasks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimamba.errors import nearest, require

if TYPE_CHECKING:
    from vimamba.tasks.task import Task

TASKS: dict[str, type[Task]] = {}


def find_task(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        UserError: there is none among those that have been imported.
    """
    from vimamba.tasks import classification, detection, segmentation  # noqa: F401 - register themselves

    hint = nearest(name, TASKS) or f"; there are {', '.join(sorted(TASKS))}"
    require(name in TASKS, f"`task` {name}: there is no such task{hint}")
    return TASKS[name]
