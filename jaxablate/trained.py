"""What a run has learned, restored for use outside of training."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax

from jaxablate import disk
from jaxablate.checkpoint import Checkpoints, identity
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir
from jaxablate.task import Task, Variables
from jaxablate.trees import flat

Which = Literal["best", "final"]


@dataclass(frozen=True)
class Trained:
    """The variables that evaluation used: with the averaged parameters, where the run keeps an average.

    The task's base is not among them: all members share it, and a checkpoint has none of it (see `inputs`).
    """

    step: int
    data: str  # fingerprint of the data, and of the base, that it was trained on
    variables: Variables


def restore(task: Task[Any, Any], run: RunConfig[Any, Any], where: RunDir, which: Which) -> Trained:
    """The variables of a finished run, on this process's first device. The optimiser's state stays on disk.

    Args:
      task: made of the config of this run, or of another member of its arm.
      where: the directory of the run.
      which: the checkpoint with the best response, or the last one; they are the same where training.restore=best.

    Raises:
      UserError: the checkpoint is gone, damaged, or of another program.
    """
    summary = disk.read_json(where.summary)
    final = summary.get(
        "final_checkpoint", summary["steps"]
    )  # another step, if the run stopped before its cohort
    step = summary["best_checkpoint"] if which == "best" else final
    own = identity(run.fingerprint, summary["data"])
    with contextlib.closing(Checkpoints(where.checkpoints, own, run.host.keep_last)) as store:
        there = store.steps()
        other = "final" if which == "best" else "best"
        if step not in there:
            about = "" if step is None else f" of step {step}"
            kept = f"there are those of steps {', '.join(map(str, there))}" if there else "there is none"
            raise UserError(
                f"{where.checkpoints}: the {which} checkpoint{about} is gone, {kept}; use --checkpoint={other}, or "
                f"train the run again in another workdir"
            )
        if problem := store.verify(step):
            raise UserError(
                f"{where.checkpoints}: the {which} checkpoint of step {step} is damaged ({problem}); use "
                f"--checkpoint={other}, or train the run again in another workdir"
            )
        params = "ema" if any(name.startswith("ema/") for name in store.names(step)) else "params"
        wanted = _wanted(task, params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in flat(wanted).items()
        }
        found = store.restore(step, target, which="named")
    restored = jax.tree.unflatten(jax.tree.structure(wanted), [found[name] for name in target])
    return Trained(step, summary["data"], {"params": restored[params], **restored["collections"]})


def _wanted(task: Task[Any, Any], params: str) -> dict[str, Any]:
    """Shapes of what `Task` functions take, named as `program.State` names them."""
    variables = nn.unbox(jax.eval_shape(lambda: task.init(jax.random.key(0))))
    others = {name: value for name, value in variables.items() if name != "params"}
    return {params: variables["params"], "collections": others}
