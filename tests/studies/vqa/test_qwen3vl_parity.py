"""Qwen3-VL against the transformers library: its random weights, saved by it and loaded by us, give its logits.

Optional: skipped where torch or transformers is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.decoding import continue_prompts
from jaxablate.nn.lora import Lora
from jaxablate.peft import save_adapter
from jaxablate.studies.vqa.config import VqaModel
from jaxablate.studies.vqa.model import Vlm
from jaxablate.studies.vqa.qwen3vl import images, load, model
from jaxablate.studies.vqa.qwen3vl.config import TINY, Qwen3VlConfig, read_config
from jaxablate.studies.vqa.qwen3vl.model import Qwen3Vl
from jaxablate.studies.vqa.qwen3vl.save import save

torch: Any = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers: Any = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VOCAB = 61
IMAGE, VIDEO, VISION_START, VISION_END = range(57, 61)
TEXT = 57  # ids below it are text, and may be drawn
# Rows and columns of patches of each row's pictures: odd shapes, several in a row, none.
LAYOUTS = {
    "text only": [[], []],
    "one image": [[(4, 6)], [(2, 2)]],
    "several images": [[(2, 10), (6, 4)], [(4, 4)], [(2, 2), (8, 2), (2, 4)]],
}


def build(folder: Path, tied: bool) -> tuple[Any, Qwen3VlConfig]:
    """A tiny random model of theirs, saved in several shards."""
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 4,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # biases and norms begin at zeros and ones, where an error would not show
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.4, 1.4)
    theirs.save_pretrained(folder, max_shard_size="60KB")
    return theirs, read_config(folder)


@pytest.fixture(scope="module", params=["own", "tied"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Qwen3Vl, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs, config = build(folder, tied=request.param == "tied")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = Qwen3Vl(config)
    params = load.load(folder, config, model.shapes(ours), dtype="kept")
    return theirs, ours, jax.tree.map(jnp.asarray, nn.unbox(params))


def rows_of(layout: list[list[tuple[int, int]]]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Tokens and patches of each row: text of odd lengths around the pictures, which may begin or end it."""
    rng = np.random.default_rng(3)
    tokens, patches = [], []
    for number, grids in enumerate(layout):
        row = list(rng.integers(0, TEXT, 2 * number))
        for height, width in grids:
            row += [VISION_START, *[IMAGE] * (height * width // 4), VISION_END, *rng.integers(0, TEXT, 3)]
        tokens.append(np.array([*row, *rng.integers(0, TEXT, 5)]))
        patches.append([rng.normal(size=(h * w, 96)).astype(np.float32) for h, w in grids])
    return tokens, patches


def expected(
    theirs: Any, tokens: np.ndarray, patches: list[np.ndarray], grids: list[tuple[int, int]]
) -> np.ndarray:
    """Their logits of one row."""
    ids = torch.tensor(tokens)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if grids:
        given |= {
            "pixel_values": torch.tensor(np.concatenate(patches)),
            "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    with torch.no_grad():
        return theirs(**given).logits[0].numpy()


def padded(
    tokens: list[np.ndarray], patches: list[list[np.ndarray]], layout: list[list[tuple[int, int]]]
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The rows as one batch of ours."""
    length = max(map(len, tokens))
    ids = np.stack([np.pad(row, (0, length - len(row))) for row in tokens])
    if not any(layout):
        return jnp.asarray(ids), None, None
    pictures, count = max(map(len, layout)), max(h * w for row in layout for h, w in row)
    values = np.zeros((len(layout), pictures, count, 96), np.float32)
    grids = np.zeros((len(layout), pictures, 2), np.int32)
    for i, row in enumerate(layout):
        for j, grid in enumerate(row):
            values[i, j, : len(patches[i][j])] = patches[i][j]
            grids[i, j] = grid
    return jnp.asarray(ids), jnp.asarray(values), jnp.asarray(grids)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_theirs(pair: tuple[Any, Qwen3Vl, Any], name: str) -> None:
    theirs, ours, params = pair
    layout = LAYOUTS[name]
    tokens, patches = rows_of(layout)
    found = np.asarray(jax.jit(ours.apply)({"params": params}, *padded(tokens, patches, layout)))
    for i, row in enumerate(tokens):
        wanted = expected(theirs, row, patches[i], layout[i])
        assert np.abs(wanted).max() > 0.5  # there is something to be equal to
        np.testing.assert_allclose(found[i, : len(row)], wanted, atol=1e-4, rtol=0)
    if any(layout):  # the pictures matter
        other = jax.jit(ours.apply)(
            {"params": params}, *padded(tokens, [[-p for p in r] for r in patches], layout)
        )
        assert np.abs(np.asarray(other)[0, len(tokens[0]) - 1] - found[0, len(tokens[0]) - 1]).max() > 1e-2


@pytest.mark.parametrize("pair", ["own"], indirect=True)
def test_greedy_answers_are_theirs(pair: tuple[Any, Qwen3Vl, Any]) -> None:
    theirs, ours, params = pair
    layout = LAYOUTS["several images"]
    tokens, patches = rows_of(layout)
    ids, values, grids = padded(tokens, patches, layout)
    lengths, limit = jnp.array([len(row) for row in tokens], jnp.int32), 6
    cached = Qwen3Vl(ours.config, context=ids.shape[1] + limit)
    answers = continue_prompts(
        lambda tokens, last: model.fill(cached, {"params": params}, tokens, last, values, grids),
        lambda cache, tokens, at: model.extend(cached, {"params": params}, cache, tokens, at),
        ids.astype(jnp.int32),
        lengths,
        jax.random.split(jax.random.key(0), len(tokens)),
        limit=limit,
        context=cached.context,
        size=TEXT,
        temperature=0.0,
        top_p=1.0,
    )
    for i, row in enumerate(tokens):
        for drawn in np.asarray(answers.tokens[i]):
            assert drawn == expected(theirs, row, patches[i], layout[i])[-1, :TEXT].argmax()
            row = np.append(row, drawn)


@pytest.mark.parametrize("pair", ["own"], indirect=True)
def test_an_adapter_is_peft_s(pair: tuple[Any, Qwen3Vl, Any], tmp_path: Path) -> None:
    """Beside their model, read by peft from what we saved, ours gives our losses."""
    library: Any = pytest.importorskip("peft", reason="needs peft")
    theirs, ours, params = pair
    vlm = Vlm(ours.config, Lora(VqaModel().lora_targets), loop="unrolled")
    adapter = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape),
        nn.unbox(vlm.init_adapter(jax.random.key(0))),
    )
    save_adapter(tmp_path, adapter, vlm.lora, vlm.adapter_names, "org/base")
    layout = LAYOUTS["one image"][:1]
    tokens, patches = rows_of(layout)
    ids, values, grids = padded(tokens, patches, layout)
    assert values is not None and grids is not None
    targets = jnp.full(ids.shape, -100).at[:, -4:].set(jnp.array([5, 3, 2, 8]))
    given = {"tokens": ids, "targets": targets, "patches": values, "grids": grids}
    variables = {"params": adapter, "base": params, "quantized": {}}
    found, count = jax.jit(vlm.losses)(variables, given, None)
    assert count.tolist() == [4]

    def nll() -> float:
        logits = expected(theirs, tokens[0], patches[0], layout[0])[-4:].astype(np.float64)
        chosen = logits[np.arange(4), [5, 3, 2, 8]]
        return float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())

    plain = nll()
    adapted = library.PeftModel.from_pretrained(theirs, str(tmp_path))  # which changes theirs in place
    assert nll() == pytest.approx(float(found[0]), abs=1e-3)
    assert abs(plain - float(found[0])) > 0.1
    adapted.unload()


def test_they_read_a_checkpoint_of_ours(tmp_path: Path) -> None:
    """The base of the small scale, as it is kept after its training on captions."""
    ours = Qwen3Vl(TINY, loop="scan")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0.3, 0.3, x.shape).astype(np.float32), nn.unbox(model.shapes(ours))
    )
    save(tmp_path, TINY, params)
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokens = np.array([*[TINY.image_token] * 36, *rng.integers(1, 97, 20)])
    patches = rng.normal(size=(36, TINY.vision.patch_size)).astype(np.float32)
    ids, mask = torch.tensor(tokens)[None], torch.ones((1, len(tokens)), dtype=torch.int64)
    with torch.no_grad():
        wanted = theirs(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.tensor(patches),
            image_grid_thw=torch.tensor([(1, 6, 6)]),
            mm_token_type_ids=(ids == TINY.image_token).int(),
        ).logits[0]
    found = jax.jit(ours.apply)(
        {"params": params}, jnp.asarray(tokens)[None], patches[None, None], jnp.array([[[6, 6]]])
    )
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found[0], wanted.numpy(), atol=1e-4, rtol=1e-4)


def test_patches_are_theirs() -> None:
    from PIL import Image

    size = {"shortest_edge": images.MIN_PIXELS, "longest_edge": 600_000}
    options = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(**options)
    from jaxablate.studies.vqa.qwen3vl.config import QWEN3_VL_2B

    rng = np.random.default_rng(0)
    for width, height in ((300, 200), (1001, 333), (33, 64), (1400, 900)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        wanted = processor(images=[image], return_tensors="np")
        picture = images.prepare(image, QWEN3_VL_2B.vision, high=size["longest_edge"])
        assert (1, *picture.grid) == tuple(wanted["image_grid_thw"][0])
        np.testing.assert_allclose(
            images.normalised(jnp.asarray(picture.patches)), wanted["pixel_values"], atol=1e-6
        )
