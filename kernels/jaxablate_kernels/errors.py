"""What can go wrong when a kernel is chosen."""


class KernelUnsupported(ValueError):
    """A named implementation cannot run this problem.  Nothing falls back: the caller chooses again.

    Attributes:
        op: the operation, as in `dispatch.operations()`.
        name: the implementation that was asked for.
        reason: the argument that is in the way and what is supported, in one line.
        alternatives: the implementations which would take the same problem, possibly none.
    """

    def __init__(self, op: str, name: str, reason: str, alternatives: tuple[str, ...]):
        self.op = op
        self.name = name
        self.reason = reason
        self.alternatives = alternatives
        instead = " or ".join(repr(other) for other in alternatives)
        advice = f"choose {instead} for it" if instead else "no implementation takes it"
        super().__init__(f"{op} implementation {name!r} cannot run this: {reason}; {advice}")

    def __reduce__(self):
        # An exception is rebuilt from `args`, which holds the message only; runs cross process borders.
        return type(self), (self.op, self.name, self.reason, self.alternatives)


class PackageMissing(ImportError):
    """A named implementation needs a package that is not installed; the message has the command for it."""
