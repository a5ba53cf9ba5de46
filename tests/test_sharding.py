"""Eight forced host devices: whatever the mesh, the same training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxablate import config, data
from jaxablate.checkpoint import Checkpoints
from jaxablate.config import MeshConfig
from jaxablate.errors import UserError
from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block
from jaxablate.nn.ffn import Ffn
from jaxablate.nn.layout import laid_out_on
from jaxablate.nn.norm import Norm
from jaxablate.program import Program
from jaxablate.sharding import activation_sharding, make_mesh
from jaxablate.studies.ctclip.task import CtClipTask

pytestmark = pytest.mark.alone

MESHES = {
    "one device": MeshConfig(1, 1, 1, 1),
    "data": MeshConfig(1, 8, 1, 1),
    "fsdp": MeshConfig(1, 1, 8, 1),
    "member": MeshConfig(2, 1, 1, 1),
    "tensor": MeshConfig(1, 1, 1, 4),
    "all": MeshConfig(2, 2, 2, 1),
}
OVERRIDES = [
    ("seeds", "0,1"), ("training.batch_size", "8"), ("training.steps", "4"), ("optim.warmup_steps", "0"),
    # Without these two parts, which hold no weights worth splitting, it compiles in half the time.
    ("model.image.peg", "none"), ("model.image.position_bias", "off"),
    ("data.phantoms_train", "24"), ("data.phantoms_val", "18"), ("training.eval_batch_size", "8"),
]  # fmt: skip


class Run:
    """The optimized arm of CT-CLIP at tiny, two members, on one mesh."""

    def __init__(self, mesh: MeshConfig, cache: Path):
        cohort = config.load("configs/optimized_full.py", OVERRIDES)
        self.task = CtClipTask(cohort.base, "cpu")
        self.source = self.task.open(cache)
        devices = jax.devices()[: np.prod([mesh.member, mesh.data, mesh.fsdp, mesh.tensor])]
        self.program = Program(self.task, cohort, self.task.stages()[0], make_mesh(mesh, 2, 8, devices))
        self.batches = data.CohortBatches(self.source.train, [0, 1], 8, 4)
        self.step = self.program.compile_step()

    def train(self, state: Any, first: int, last: int) -> tuple[Any, np.ndarray]:
        losses = []
        for n in range(first, last + 1):
            batch = self.program.put_batch(self.batches[n - 1])
            state, metrics = self.step(state, self.program.member, batch, np.int32(n))
            losses.append(np.asarray(metrics["train/loss"]))
        return state, np.array(losses)

    def take(self, state: Any) -> list[dict[str, np.ndarray]]:
        return [jax.device_get(self.program.take(state, m)) for m in range(2)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def on(repo: Path, cache: Path) -> Callable[[str], Run]:
    """The run on a named mesh, compiled once."""

    @functools.cache
    def make(name: str) -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(repo)
            return Run(MESHES[name], cache)

    return make


@pytest.fixture(scope="module")
def single(on: Callable[[str], Run]) -> tuple[Run, Any, np.ndarray]:
    run = on("one device")
    state, losses = run.train(run.program.init(), 1, 4)
    return run, run.take(state), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_sharded_steps_agree_with_one_device(
    name: str, single: tuple[Run, Any, np.ndarray], on: Callable[[str], Run]
) -> None:
    run = on(name)
    state = run.program.init()
    start = single[0].program.init()
    for a, b in zip(run.take(state), single[0].take(start), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    if name in ("fsdp", "tensor"):
        spread = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
        assert len(spread) > 10
    state, losses = run.train(state, 1, 4)
    np.testing.assert_allclose(losses, single[2], rtol=1e-4)
    assert np.ptp(single[2][:, 0]) > 1e-4  # the steps do something
    outputs = jax.device_get(run.program.predict(state, run.source.evaluation[1]))
    assert outputs["image"].shape == (2, 8, 32)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_resumes_on_another(
    single: tuple[Run, Any, np.ndarray], on: Callable[[str], Run], tmp_path: Path
) -> None:
    first, second = on("all"), on("data")
    state, _ = first.train(first.program.init(), 1, 2)
    before = first.take(state)
    restored = []
    for m in range(2):
        store = Checkpoints(tmp_path / str(m), "run", 3)
        store.save(2, first.program.take(state, m), regular=True)
        store.close()
        restored.append(
            Checkpoints(tmp_path / str(m), "run", 3).restore(2, second.program.abstract_checkpoint())
        )
    moved = second.program.stack(restored)
    for a, b in zip(second.take(moved), before, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    _, losses = second.train(moved, 3, 4)
    np.testing.assert_allclose(losses, single[2][2:], rtol=1e-4)


@pytest.mark.parametrize(
    "mesh,members,rows,shape",
    [
        (MeshConfig(0, 0), 1, 16, (1, 8, 1, 1)),
        (MeshConfig(0, 0), 4, 16, (4, 2, 1, 1)),
        (MeshConfig(0, 0), 3, 16, (1, 8, 1, 1)),
        (MeshConfig(0, 0), 8, 16, (8, 1, 1, 1)),
        (MeshConfig(0, 0, fsdp=2), 2, 16, (2, 2, 2, 1)),
        (MeshConfig(0, 0, tensor=2), 1, 6, (1, 2, 1, 2)),
    ],
)
def test_axes_are_chosen_members_first_then_data(
    mesh: MeshConfig, members: int, rows: int, shape: tuple[int, ...]
) -> None:
    assert tuple(make_mesh(mesh, members, rows).shape.values()) == shape


@pytest.mark.parametrize(
    "mesh,members,rows,words",
    [
        (MeshConfig(1, 16), 1, 16, "needs 16 devices, there are 8"),
        (MeshConfig(2, 1), 3, 16, "mesh.member=2: must divide the 3 members"),
        (MeshConfig(1, 8), 1, 12, "data x fsdp = 8 must divide 12"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: MeshConfig, members: int, rows: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_mesh(mesh, members, rows)


def test_activations_have_a_place_inside_a_program_and_none_outside() -> None:
    mesh = make_mesh(MeshConfig(1, 2, 2, 2), 1, 8)
    block = Block(
        attention=functools.partial(Attention, heads=4, head_dim=4, impl="reference"),
        ffn=functools.partial(Ffn, kind="swiglu", width=16),
        norm=functools.partial(Norm, kind="rmsnorm"),
    )
    x = jnp.ones((8, 4, 16))
    variables = block.init(jax.random.key(0), x)

    def text() -> str:
        return str(jax.make_jaxpr(lambda x: block.apply(variables, x))(x))

    assert "sharding_constraint" not in text()
    with laid_out_on(mesh):
        placed = text()
    assert placed.count("sharding_constraint[") == 5  # the stream, queries, keys, values, the hidden layer
    assert str(activation_sharding(mesh, ("batch", None, "heads"), (8, 3, 3)).spec[0]) == "('data', 'fsdp')"
    assert (
        activation_sharding(mesh, ("batch", None, "heads"), (8, 3, 3)).spec[2] is PartitionSpec.UNCONSTRAINED
    )
