"""Optional, with torch and peft: the same adapter beside the same base gives the same outputs, whoever saved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxablate.nn import lora
from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Stack
from jaxablate.nn.lora import Lora
from jaxablate.nn.projections import projections
from jaxablate.peft import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

HEADS, KV_HEADS, HEAD_DIM, DIM, DEPTH = 4, 2, 8, 16, 2
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(3, 7, DIM)).astype(np.float32)
SPEC = Lora(("*/attention/*",), rank=3, alpha=6.0)
OURS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
NAMES = {
    f"layers/attention/{ours}": [f"layers.{i}.{theirs}" for i in range(DEPTH)]
    for theirs, ours in OURS.items()
}
BASE = "org/base"


class TorchLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        sizes = {"q_proj": (DIM, inner), "k_proj": (DIM, kv), "v_proj": (DIM, kv), "o_proj": (inner, DIM)}
        for name, (n_in, n_out) in sizes.items():
            setattr(self, name, torch.nn.Linear(n_in, n_out, bias=False))

    def forward(self, x: Any) -> Any:
        def heads(y: Any) -> Any:
            return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o_proj(mixed.transpose(1, 2).flatten(2))


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(TorchLayer() for _ in range(DEPTH))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = Attention(
            heads=HEADS, head_dim=HEAD_DIM, kv_heads=KV_HEADS, impl="reference", name="attention"
        )
        return x + attention(x)


MODEL = Stack(Layer, DEPTH, loop="scan")


def ours() -> dict[str, Any]:
    with projections(adapters=SPEC):
        params = nn.unbox(MODEL.init(KEY, jnp.asarray(X))["params"])
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)


def theirs(params: dict[str, Any]) -> TorchModel:
    """The torch model with the base of ours."""
    model = TorchModel()
    kernels = params["layers"]["attention"]
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            for name, own in OURS.items():
                weight = getattr(layer, name).weight
                kernel = np.asarray(kernels[own]["kernel"])[i].reshape(weight.shape[::-1])
                weight.copy_(torch.from_numpy(kernel.T.copy()))
    return model


def outputs(params: dict[str, Any]) -> np.ndarray:
    with projections(adapters=SPEC):
        return np.asarray(MODEL.apply({"params": params}, jnp.asarray(X)))


def test_peft_computes_the_same_from_what_we_save(tmp_path: Path) -> None:
    params = ours()
    _, adapter = lora.split(params)
    save_adapter(tmp_path, adapter, SPEC, NAMES, BASE)
    model = peft.PeftModel.from_pretrained(theirs(params), str(tmp_path)).eval()
    with torch.no_grad():
        got = model(torch.from_numpy(X)).numpy()
        plain = theirs(params)(torch.from_numpy(X)).numpy()
        merged = model.merge_and_unload()
    np.testing.assert_allclose(got, outputs(params), atol=1e-5)
    assert np.abs(got - plain).max() > 0.1  # the adapter is not idle
    kernels = lora.merge(params, SPEC)["layers"]["attention"]
    for name, own in OURS.items():
        weight = getattr(merged.layers[1], name).weight.detach().numpy()
        np.testing.assert_allclose(
            np.asarray(kernels[own]["kernel"])[1].reshape(weight.T.shape), weight.T, atol=1e-6
        )


def test_we_compute_the_same_from_what_peft_saves(tmp_path: Path) -> None:
    params = ours()
    base, adapter = lora.split(params)
    config = peft.LoraConfig(r=SPEC.rank, lora_alpha=6, target_modules=list(OURS), init_lora_weights=True)
    model = peft.get_peft_model(theirs(params), config)
    generator = torch.Generator().manual_seed(0)
    bounds = []
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_A" in name:
                bounds.append(float(value.abs().max()) * value.shape[1] ** 0.5)
            if "lora_B" in name:
                assert not value.any()
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        wanted = model.eval()(torch.from_numpy(X)).numpy()
    model.save_pretrained(str(tmp_path))
    loaded = load_adapter(tmp_path, adapter, SPEC, NAMES, BASE)
    np.testing.assert_allclose(outputs(lora.join(base, loaded)), wanted, atol=1e-5)
    assert 0.8 < min(bounds) <= max(bounds) <= 1  # peft's A is uniform up to 1 / sqrt(inputs), as ours

    trees = flatten_dict(loaded)
    swapped = {
        p: trees[(*p[:2], {"k": "v", "v": "k"}.get(p[2], p[2]), *p[3:])] for p in trees
    }  # of the same shapes: only the outputs tell
    assert np.abs(outputs(lora.join(base, unflatten_dict(swapped))) - wanted).max() > 1e-2
