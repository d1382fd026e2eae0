"""Which backend is at work, where Dynamo traces a module or would compile the next frame.

Private: the translator that traces now, the callback that compiles frames, and the wrappers that both put around a
backend (torch 2.11 to 2.15).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo import symbolic_convert
from torch._dynamo.eval_frame import innermost_backend

from .calls import runs_uncompiled


@runs_uncompiled
def backend_at_work() -> Any:
    """What torch.compile was given as a backend, by name or as a callable: of the graph that is being traced, else of
    those that the frames called from here would go to; of a method its object. None where nothing is compiled."""
    translator = getattr(symbolic_convert.tls, "current_tx", None)
    if translator is not None:
        found = translator.output.compiler_fn
    else:
        found = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    if not callable(found):  # nothing compiles, or what has been compiled runs and no more
        return None
    innermost = innermost_backend(found)
    given = getattr(innermost, "compiler_fn", innermost)
    return getattr(given, "__self__", given)
