"""LoRA weight space: which concept was an adapter trained on, by representation, and without the text's tensors.

    jaxablate run configs/lora_space.py                              # ten representations x two, synthetic, tiny
    jaxablate run configs/lora_space.py:scale=1k       # the document's sizes: sanity, 1k, 10k, 50k, which is `paper`
    jaxablate run configs/lora_space.py:scale=1k,runs=quick          # three runs of each instead of ten
    jaxablate run configs/lora_space.py:arms=all                     # and `product`, and cross-attention alone
    jaxablate run configs/lora_space.py:arms=resampled               # five splits: a spread that reflects the data
    python -m jaxablate.main --config=configs/lora_space.py:spectral_visual_only,scale=1k

No hypothesis is declared: a verdict would be over the seeds, which are starts of the training on the same adapters.
What is lost without the tensors that see the text is told by the study's own part of the report, over test adapters or,
with arms=resampled, over splits.

Adapters are generated unless `data=folder`, `columnar` or `preprocessed` says otherwise:

    jaxablate run configs/lora_space.py:scale=1k,data=folder --config.data.path=adapters --config.data.samples=1000

The guide's flags:

    --dataset 1k            :scale=1k, or data=folder and --config.data.path=… --config.data.samples=…
    --num-runs 10           :runs=10
    --quick                 :runs=quick
    --output-dir            --workdir=…; the guide's files are <workdir>/lora_space/report/results.{json,txt}
    --cache-features        always; a hit is checked against a recompute
    --cache-dir             --config.host.cache=…
    --dropout .5            --config.model.dropout=0.5
    --weight-decay 1e-4     --config.optim.weight_decay=1e-4
    --hidden-dim 512        --config.model.hidden=512
    --batch-size 256        --config.training.batch_size=256 (epochs follow)
    --sample-layers 1.0     --config.data.sample_layers=0.5
    --no-amp                the default; --config.training.compute_dtype=bfloat16 is the opposite
    --num-workers 4         --config.host.workers=4: processes that read batches; features take every core
    --preprocess-only       jaxablate check
    --dataset-cache-dir     --config.host.cache=…
"""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg, quotient
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.config import (
    REPRESENTATIONS,
    TENSORS,
    LoraSpaceData,
    LoraSpaceModel,
    split_sizes,
)
from jaxablate.study import Expectation, Factor, Response, Study, product

SPLITS = (42, 43, 44, 45, 46)

# Another representation is other data, and a first layer of another width: so these are model factors.
REPRESENTATION = Factor(
    "representation",
    "model",
    {name: {"data.representation": name} if i else {} for i, name in enumerate(REPRESENTATIONS)},
)
TENSOR_SET = Factor(
    "tensors", "model", {name: {"data.tensors": name} if i else {} for i, name in enumerate(TENSORS)}
)
SPLIT = Factor(
    "split",
    "data",
    {str(seed): {"data.split_seed": seed} if i else {} for i, seed in enumerate(SPLITS)},
)


def in_document(levels: Mapping[str, str]) -> bool:
    return levels["representation"] != "product" and levels["tensors"] != "text_only"


def name_of(levels: Mapping[str, str]) -> str:
    """The document's names, `spectral_visual_only`; with its split where there are several."""
    split = f"_split{levels['split']}" if "split" in levels else ""
    return f"{levels['representation']}_{levels['tensors']}{split}"


FACTORS = {
    "document": (REPRESENTATION, TENSOR_SET),
    "all": (REPRESENTATION, TENSOR_SET),
    "resampled": (REPRESENTATION, TENSOR_SET, SPLIT),
}
ARMS = {
    kind: product(*factors, where=(lambda _: True) if kind == "all" else in_document, names=name_of)
    for kind, factors in FACTORS.items()
}


def responses(scale: str, source: str) -> tuple[Response, ...]:
    # What naming always the same class scores; of data that is read, each run records it.
    chance = 1 / CLASSES.get(scale, 10) if source == "synthetic" else None
    accuracy = functools.partial(Response, direction="max", chance=chance)
    f1 = Response("val/test_f1", "max")
    return accuracy("val/test_accuracy"), f1, accuracy("val/accuracy"), accuracy("val/train_accuracy")


# Test accuracy in percent, of the real adapters: all layers, and self-attention alone.
PUBLISHED = {
    "1k": {
        "simple_stats": ((38.1, 0.6), None),
        "spectral": ((39.2, 1.3), (29.5, 1.2)),
        "distribution": ((39.7, 2.1), (31.5, 2.2)),
        "frequency": ((41.0, 1.9), (29.2, 0.9)),
    },
    "10k": {
        "simple_stats": ((48.7, 0.7), (33.3, 0.4)),
        "rank_based": ((53.9, 0.4), (36.9, 0.6)),
        "stats": ((52.1, 0.8), (34.0, 0.6)),
        "spectral": ((47.8, 0.5), (33.0, 0.7)),
        "matrix_norms": ((49.9, 0.6), (34.4, 0.5)),
        "distribution": ((55.2, 0.6), (36.2, 0.6)),
        "frequency": ((57.7, 0.9), (31.6, 0.7)),
        "flat_vec": ((51.7, 1.2), (43.0, 1.2)),
        "info_theoretic": ((26.2, 0.5), (19.9, 0.5)),
        "ensemble": ((61.8, 0.6), (36.5, 0.5)),
    },
}


def expectations(scale: str, source: str, arms: str) -> tuple[Expectation, ...]:
    """The published accuracies, within three of their deviations; generated adapters owe them nothing."""
    if source == "synthetic" or arms == "resampled":
        return ()
    return tuple(
        Expectation(
            f"{arm}: {mean} ± {std} % of the real adapters",
            arm=arm,
            response="test_accuracy",
            against="nothing",
            low=(mean - 3 * std) / 100,
            high=(mean + 3 * std) / 100,
        )
        for name, both in PUBLISHED.get(scale, {}).items()
        for arm, found in zip((f"{name}_all_layers", f"{name}_visual_only"), both, strict=True)
        if found is not None
        for mean, std in [found]
    )


CLASSES = {"tiny": 5}
EPOCHS = {"tiny": 40, "sanity": 20, "1k": 200, "10k": 200, "50k": 200}
RUNS = {"tiny": 3, "sanity": 3, "1k": 10, "10k": 10, "50k": 10}
NUMBERS = ("", "quick", *map(str, range(1, 101)))


def tiny(config: ConfigDict) -> None:
    config.data.update(architecture="tiny", samples=600, classes=5)
    config.model.hidden = 64
    config.training.batch_size = 64


def sanity(config: ConfigDict) -> None:
    config.data.update(samples=100, rank=4)


def thousands(samples: int, config: ConfigDict) -> None:
    config.data.samples = samples


SCALES = {
    "tiny": tiny,
    "sanity": sanity,
    "1k": functools.partial(thousands, 1_000),
    "10k": functools.partial(thousands, 10_000),
    "50k": functools.partial(thousands, 50_000),
}
PAPER = {"paper": "50k"}  # the document's largest, under the name that every study has
SOURCES = ("synthetic", "folder", "columnar", "preprocessed")


def base_config(scale: str, source: str) -> ConfigDict:
    """The config of a scale. Its cadences follow the number of adapters, also when the command line changes that."""
    config = new_config(
        study="lora_space",
        task="jaxablate.studies.lora_space.task:LoraSpaceTask",
        model=LoraSpaceModel(),
        data=LoraSpaceData(),
    )
    config.training.update(batch_size=256, eval_batch_size=1000)
    SCALES[scale](config)
    config.scale = scale
    if source != "synthetic":  # what is read says for itself what it is
        plain = LoraSpaceData()
        config.data.update(architecture=plain.architecture, classes=plain.classes, rank=plain.rank)
    if source == "preprocessed":
        config.data.samples = split_sizes(config.data.samples)[0]
    config.data.source = source
    config.optim.update(learning_rate=1e-3, weight_decay=1e-4, decay="all", decay_at="gradient")
    config.optim.update(b1=0.9, b2=0.999, clip_norm=0.0, schedule="constant")
    config.optim.update(plateau_factor=0.5, plateau_patience=10)
    config.training.update(early_stop=15, restore="best")

    samples, batch = config.data.get_ref("samples"), config.training.get_ref("batch_size")
    trained = samples if source == "preprocessed" else samples - quotient(3 * samples, 10)
    epoch = quotient(trained, batch)  # a reference: what is made of it follows an override
    config.training.eval_every = epoch
    config.training.steps = EPOCHS[scale] * epoch
    config.host.log_every = epoch
    config.host.checkpoint_every = 50 * epoch
    config.host.keep_last = 1
    return config


def get_study(arg: str = "") -> Study:
    choice = parse_arg(arg, scale=(*SCALES, *PAPER), arms=ARMS, data=SOURCES, runs=NUMBERS)
    scale, source, kind = PAPER.get(choice["scale"], choice["scale"]), choice["data"], choice["arms"]
    runs = {"": RUNS[scale], "quick": 3}.get(choice["runs"]) or int(choice["runs"])
    fields: dict[str, Any] = {
        "base": base_config(scale, source),
        "factors": FACTORS[kind],
        "arms": ARMS[kind],
        "seeds": tuple(42 + run for run in range(runs)),
        "responses": responses(scale, source),
        "expectations": expectations(scale, source, kind),
        "groups": {t: tuple(arm.name for arm in ARMS[kind] if arm.levels["tensors"] == t) for t in TENSORS},
        "extra_report": "jaxablate.studies.lora_space.report:write",
    }
    title = "LoRA weight space: what tells the concept of an adapter"
    if kind == "resampled":
        return Study(name="lora_space_resampled", title=f"{title}, over {len(SPLITS)} splits", **fields)
    return Study(name="lora_space", title=title, **fields)


def get_config(arg: str = "") -> ConfigDict:
    kinds = {arm.name: kind for kind in reversed(ARMS) for arm in ARMS[kind]}
    scales = (*SCALES, *PAPER)
    choice = parse_arg(arg, arm=("", *kinds), scale=scales, arms=("", *ARMS), data=SOURCES, runs=NUMBERS)
    if arm := choice.pop("arm"):
        choice["arms"] = kind = choice["arms"] or kinds[arm]
        if arm not in {known.name for known in ARMS[kind]}:
            raise UserError(
                f"config argument arms='{kind}': has no arm '{arm}'; leave it out, or use {kinds[arm]}"
            )
    study = get_study(",".join(f"{key}={value}" for key, value in choice.items() if value))
    config = study.config(arm or study.baseline)
    config.seeds = study.seeds[:1]
    return config
