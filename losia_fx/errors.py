"""What losia_fx raises and warns with. Every text names the weight or the option, what was found, and what to do."""

from collections.abc import Sequence


class LosiaError(Exception):
    """Base of every error of losia_fx."""


class ConfigError(LosiaError, ValueError):
    """An option of :class:`losia_fx.LosiaConfig` has a value that cannot be used, or does not exist."""


class TransformError(LosiaError):
    """The model cannot be transformed as asked, or is not (or is already) transformed."""


class OptimizerError(LosiaError):
    """An optimizer that cannot train the subnets: made before the transformation, or of an unsupported kind."""


class StateError(LosiaError):
    """A state or a file of it that does not fit the model, or is damaged; nothing of it was loaded."""


class Swapped(StateError):
    """A forward is called with other tensors in the parameters' place, and is to run with those."""


class Torn(StateError):
    """A weight and the values of its subnet were both written, and nobody can tell which is meant."""


class DeltaError(LosiaError):
    """A delta file that cannot be made, read, applied or undone; whatever was to be changed is as it was."""


class GradientError(LosiaError, RuntimeError):
    """A derivative that losia_fx does not compute: one of second order through a weight that has a subnet, or one of
    a weight that only autograd sees and that several processes would have to average."""


class PassPreconditionError(LosiaError):
    """A graph pass was given a graph that does not hold what its plan says."""


class PassPostconditionError(LosiaError):
    """A graph pass left a graph that is not what it promises."""


class UnsupportedGraphError(LosiaError):
    """A graph that no pass of losia_fx may edit."""


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class LosiaWarning(UserWarning):
    """Something is trained otherwise than one would expect; the text says what and why."""
