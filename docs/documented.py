"""What mkdocstrings cannot read: the signature and words of `vimamba.train`, put together from its options."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from vimamba.tasks.training import train

PATH = f"{train.__module__}.{train.__name__}"


class Documented(griffe.Extension):
    """Takes them from the function as it is."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Put in what `train` says of itself."""
        if func.path != PATH:
            return
        func.docstring = griffe.Docstring(inspect.getdoc(train) or "", parent=func)
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    name,
                    annotation=p.annotation if isinstance(p.annotation, str) else None,
                    kind=griffe.ParameterKind[p.kind.name.lower()],
                    default=None if p.default is p.empty else repr(p.default),
                )
                for name, p in inspect.signature(train).parameters.items()
            )
        )
