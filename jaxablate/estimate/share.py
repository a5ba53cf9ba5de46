"""The part of a GPU's memory that jax takes, all at once when it starts. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping

from jaxablate.errors import UserError

VARIABLE = "XLA_CLIENT_MEM_FRACTION"
DEPRECATED = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the same; jax refuses the two beside each other
DEFAULT = 0.75  # jax's own


def memory_share(environment: Mapping[str, str]) -> tuple[float, str]:
    """The part of a GPU's memory that jax may use in such an environment, and who says so.

    Raises:
      UserError: it says what jax would not take.
    """
    said = [name for name in (VARIABLE, DEPRECATED) if environment.get(name)]
    if not said:
        return DEFAULT, f"what jax takes of a GPU unless {VARIABLE} says otherwise"
    if len(said) > 1:
        raise UserError(f"{DEPRECATED}={environment[DEPRECATED]}: jax refuses it beside {VARIABLE}; unset it")
    (name,) = said
    text = environment[name]
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"{name}={text}: must be a number above 0 and at most 1, such as 0.9; unset it for {DEFAULT}"
        )
    return share, f"{name}={text}"


def limited(environment: Mapping[str, str], share: float) -> dict[str, str]:
    """The environment for a process that may take this part and no more, whatever it said before."""
    return {**{k: v for k, v in environment.items() if k != DEPRECATED}, VARIABLE: f"{share:.3f}"}
