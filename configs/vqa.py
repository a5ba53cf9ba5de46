"""Surgical VQA: do the order of the data, an expert for each stage, a curriculum or a second look help a
vision-language model that is tuned by low-rank adapters?

    jaxablate run configs/vqa.py                               # five experiments on drawn scenes, two CPU cores
    jaxablate run configs/vqa.py:scale=2b --config.model.base_path=… --config.data.path=…      # Qwen3-VL: 2b, 8b
    jaxablate plan configs/vqa.py:scale=8b,arms=jobs --target=h100 --gpus=4 --deadline=6h --mfu=0.3
    jaxablate check configs/vqa.py:arms=splits                 # 1 x 16, 4 x 4, 16 x 1: the same updates
    python -m jaxablate.main --config=configs/vqa.py:exp3_stage1

The guide's eight configs are values of `arm`: exp1_random, exp2_qwen_reordered, exp3_stage1, exp3_stage2, exp3_stage3,
exp4_stage1, exp4_stage2, exp5_sequential_cot. The two of exp4 are one run: the first stops it behind stage 1, the
second takes it from there. What stands in those files:

    experiment_name                 the arm: configs/vqa.py:exp1_random
    model_name                      :scale=8b, and --config.model.base_path=… (a Hugging Face folder)
    output_dir                      --config.host.workdir=…
    prev_checkpoint                 of exp4: the run itself, found by its record
    lora.r, alpha, dropout          --config.model.lora_rank=4, lora_alpha=8.0, lora_dropout=0.05
    lora.target_modules             --config.model.lora_targets=…
    train.train_bs, grad_accum      --config.training.accumulation=4 (of training.batch_size=16: 4 x 4)
    train.lr, weight_decay          --config.optim.learning_rate=5e-5, optim.weight_decay=0.01
    train.epochs, warmup_ratio      --config.data.epochs=5, data.warmup_ratio=0.03; all lengths follow
    train.gradient_checkpointing    --config.training.remat=none (or block)
    train.bf16, max_seq_len         --config.training.compute_dtype=bfloat16, data.max_text=1024
    train.dataloader_num_workers    --config.host.workers=16
    train.save_steps, eval_steps    an epoch of what is trained: --config.data.evaluations=1 (in each)
    train.save_total_limit          --config.host.keep_last=3, and the best besides
    train.seed                      --config.seeds=42
    data.train_file, val_file       --config.data.path=… (holds train.jsonl, validation.jsonl, test.jsonl)
    data.image_root                 --config.data.image_root=…
    --max_samples                   --config.data.max_samples=…
    --model_path, --output          nothing to give: a run is evaluated on the test questions when its training ends,
                                    and the report has their results.json

On other questions, or with an adapter from elsewhere, those flags are as they were (both commands have --help):

    python -m jaxablate.studies.vqa.export --run=runs/vqa/exp2_ordered/… --output=adapters/exp2
    python -m jaxablate.studies.vqa.evaluate --model_path=adapters/exp2 --test_data=… --image_dir=… --output=r.json
"""

import functools
from typing import Any

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg, quotient
from jaxablate.errors import UserError
from jaxablate.studies.vqa.config import VqaData, VqaModel
from jaxablate.study import Arm, Factor, Hypothesis, Response, Study, switch

# ------------------------------------------------------------------------------------------- arms

ORDER = Factor("order", "data", {"random": {}, "by_stage": {"training.order": "file"}})
# An adapter of each stage instead of one: other parameters, so a model factor.
EXPERTS = switch("experts", "model", {"data.regimen": "experts"})
CURRICULUM = switch("curriculum", "data", {"data.regimen": "curriculum"})
PASSES = Factor("passes", "model", {"one": {}, "three": {"model.inference": "three_pass"}})
ONE_BY_ONE = Factor(
    "experts",
    "model",
    {
        "off": {},
        **{f"stage_{k}": {"data.regimen": "experts", "data.stages": (k,)} for k in (1, 2, 3)},
    },
)
# The document's settings before and after it was made faster, and the largest micro-batch.
SPLIT = Factor(
    "split",
    "implementation",
    {
        "1x16": {},
        "4x4": {"training.accumulation": 4, "training.remat": "none"},
        "16x1": {"training.accumulation": 1, "training.remat": "none"},
    },
)

EXP1, EXP2, EXP4, EXP5 = (
    Arm("exp1_random"),
    Arm("exp2_ordered", {"order": "by_stage"}),
    Arm("exp4_curriculum", {"order": "by_stage", "curriculum": "on"}),
    Arm("exp5_three_pass", {"order": "by_stage", "passes": "three"}),
)
EXP3 = Arm("exp3_experts", {"experts": "on"})
EXP3_ALONE = tuple(Arm(f"exp3_stage{k}", {"experts": f"stage_{k}"}) for k in (1, 2, 3))
ARMS = {
    "experiments": (EXP1, EXP2, EXP3, EXP4, EXP5),
    "jobs": (EXP1, EXP2, *EXP3_ALONE, EXP4, EXP5),
    "splits": tuple(Arm(f"split_{level}", {"split": level} if i else {}) for i, level in enumerate(SPLIT.levels)),
}  # fmt: skip
FACTORS = {
    "experiments": (ORDER, EXPERTS, CURRICULUM, PASSES),
    "jobs": (ORDER, ONE_BY_ONE, CURRICULUM, PASSES),
    "splits": (SPLIT,),
}
# The guide's names: of which arms, what it is called there, and the stage to stop behind.
GUIDE = {
    "exp2_qwen_reordered": ("experiments", "exp2_ordered", ""),
    "exp4_stage1": ("experiments", "exp4_curriculum", "stage_1"),
    "exp4_stage2": ("experiments", "exp4_curriculum", "stage_2"),
    "exp5_sequential_cot": ("experiments", "exp5_three_pass", ""),
}
KIND_OF = {arm.name: kind for kind in reversed(ARMS) for arm in ARMS[kind]}

# The guide's four chains; only the stages of exp4, which are in one run, follow from each other.
CHAINS = (
    ("exp1_random", "exp5_three_pass"),
    ("exp2_ordered",),
    ("exp3_stage1", "exp3_stage2"),
    ("exp4_curriculum",),
)

# ------------------------------------------------------------------------------------ what is asked


def responses(kind: str, scale: str) -> tuple[Response, ...]:
    """The primary one first. An arm that trains on one stage is asked about no other.

    The loss is not among them: each stage has validation questions of its own, and the last one's loss is a run's.
    """
    exact = Response("val/exact", "max")
    if kind == "splits":  # all on the same questions
        return (Response("val/loss", "min", scale="log"), exact)
    stages = (1, 2, 3) if scale == "tiny" else (1, 2)  # the document's data has no question of stage 3
    of_stages = tuple(Response(f"val/exact_stage{k}", "max") for k in stages)
    if kind == "jobs":
        return of_stages
    others = ("smart_match", "set_f1")  # an empty answer passes the document's own, smart_match_faithful
    return (
        exact,
        *of_stages,
        *(Response(f"val/{name}", "max") for name in others),
        Response("val/count_mae", "min"),
    )


QUESTIONS = {
    "order_helps": ("exp2_ordered", "exp1_random", "questions by their clinical stage"),
    "experts_help": ("exp3_experts", "exp1_random", "an expert for each stage"),
    "curriculum_helps": ("exp4_curriculum", "exp2_ordered", "stage after stage, instead of all in every epoch"),
    "passes_help": ("exp5_three_pass", "exp2_ordered", "a second and a third look at one's own answer"),
}  # fmt: skip


def hypotheses(kind: str) -> tuple[Hypothesis, ...]:
    """Each of the document's ideas against the experiment that lacks it alone."""
    if kind != "experiments":
        return ()
    found = []
    for name, (treatment, control, words) in QUESTIONS.items():
        about = functools.partial(Hypothesis, treatment=treatment, control=control)
        found += [
            about(name, "superiority", text=f"{words}: more answers are right"),
            about(
                f"{name}_or_does_no_harm", "non_inferiority", margin=0.01, primary=False,
                text=f"{words}, one-sided: at most one answer in a hundred fewer",
            ),
        ]  # fmt: skip
    return tuple(found)


# ------------------------------------------------------------------------------------------- scales


def tiny(config: ConfigDict) -> None:
    config.model.update(size="tiny", base="pretrained", storage="float", loop="unrolled")
    config.model.update(base_batch_size=64, base_learning_rate=6e-3)
    config.model.update(
        attention_impl="reference", loss_impl="reference"
    )  # short and narrow: no need of more
    config.data.update(source="synthetic", wording="short", image_tokens=36, max_text=192)
    config.data.buckets = (96, 112, 192)
    config.data.questions.update(stage_1=540, stage_2=1620, stage_3=540)
    config.training.eval_batch_size = 120
    config.optim.learning_rate = 5e-3


def published(size: str, config: ConfigDict) -> None:
    config.model.size = size
    config.training.update(accumulation=4, compute_dtype="bfloat16", remat="block")
    config.host.workers = 8


SCALES = {
    "tiny": tiny,
    "2b": functools.partial(published, "2b"),
    "8b": functools.partial(published, "8b"),
}
PAPER = {"paper": "8b"}  # the document's model, under the name that every study has


def base_config(scale: str, kind: str) -> ConfigDict:
    """The config of a scale. Lengths and cadences follow the number of questions, also an overridden one."""
    config = new_config(
        study="vqa",
        task="jaxablate.studies.vqa.task:VqaTask",
        model=VqaModel(),
        data=VqaData(),
    )
    config.optim.update(learning_rate=5e-5, weight_decay=0.01, b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0)
    config.optim.update(schedule="linear", first_update=0, end_fraction=0.0)
    config.training.update(batch_size=16, eval_batch_size=16, restore="best")
    SCALES[scale](config)
    config.scale = scale
    if kind == "splits":
        config.training.update(accumulation=16, remat="block")

    asked = config.data.questions
    questions = asked.get_ref("stage_1") + asked.get_ref("stage_2") + asked.get_ref("stage_3")
    epoch = quotient(questions, config.training.get_ref("batch_size"))
    steps, exactly = config.data.get_ref("epochs") * epoch, config.data.get_ref("warmup_ratio")
    config.training.steps = steps
    config.optim.warmup_steps = quotient((steps * exactly * 1e6).to_int(), 10**6)
    config.training.eval_every = quotient(epoch, config.data.get_ref("evaluations"))
    config.host.checkpoint_every = epoch
    config.host.log_every = 10 if scale == "tiny" else 50
    return config


# ---------------------------------------------------------------------------------------- the study


def get_study(arg: str = "") -> Study:
    choice = parse_arg(arg, scale=(*SCALES, *PAPER), arms=ARMS)
    scale, kind = PAPER.get(choice["scale"], choice["scale"]), choice["arms"]
    fields: dict[str, Any] = {
        "base": base_config(scale, kind),
        "factors": FACTORS[kind],
        "arms": ARMS[kind],
        "seeds": (0, 1, 2) if scale == "tiny" else (42, 43, 44),
        "responses": responses(kind, scale),
        "hypotheses": hypotheses(kind),
        "extra_report": "jaxablate.studies.vqa.report:write",
    }
    if kind == "jobs":
        fields["arms"] = tuple(arm for arm in ARMS[kind] if scale == "tiny" or arm.name != "exp3_stage3")
        fields["chains"] = CHAINS
    title = "Surgical VQA: order, experts, curriculum, three passes"
    if kind == "experiments":
        return Study(name="vqa", title=title, **fields)
    return Study(name=f"vqa_{kind}", title=f"{title}: {kind}", **fields)


def get_config(arg: str = "") -> ConfigDict:
    choice = parse_arg(arg, arm=("", *GUIDE, *KIND_OF), scale=(*SCALES, *PAPER), arms=("", *ARMS))
    asked = choice["arm"]
    home, name, until = GUIDE.get(asked, (KIND_OF.get(asked, ""), asked, ""))
    kind = choice["arms"] or home or next(iter(ARMS))
    study = get_study(f"scale={choice['scale']},arms={kind}")
    # Also exp3_stage3, which has no job where it has no data.
    arms = {arm.name: arm for arm in ARMS[kind]}
    arm = arms.get(name or study.baseline)
    if arm is None:
        raise UserError(
            f"config argument arms='{kind}': has no arm '{asked}'; leave it out, or use arms={home}"
        )
    config = study.combine(arm.name, arm.levels)
    config.seeds = study.seeds[:1]
    config.host.until = until
    return config
