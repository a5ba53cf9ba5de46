"""The Burgers sections of a run's config. Defaults are the document's 128-token arm, clean definition.

Imports no jax, so that a study can be declared, listed and reported without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EncoderConfig:
    """Fields to tokens and back.

    Attributes:
      kind: `trained` is learned together with the decoder in stage 0, and frozen then. `faithful_random` is
        upstream's: it keeps its random start, and nothing decodes it but a decoder of the reward.
      tokens: of a field; they lie in a row.
      dim: channels of a token.
      stem: channels of the residual convolution over the standardised field.
      cells: `pooled` gives a token the mean of its cells and of their coordinates, as upstream; `patch` gives
        it the values of its cells side by side.
    """

    kind: Literal["trained", "faithful_random"] = "trained"
    tokens: int = 128
    dim: int = 64
    stem: int = 32
    cells: Literal["pooled", "patch"] = "patch"


@dataclass(frozen=True)
class DecoderConfig:
    """Cross-attention from the cells' Fourier features to the tokens."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    ffn: int = 256


@dataclass(frozen=True)
class CoreConfig:
    """What moves the tokens by a step in time.

    Attributes:
      kind: `pdet_stack` is `depth` layers at one length; `pdet_unet` halves the tokens between levels of
        `depths` layers, the last of which is the bottleneck, and goes back up along skips.
      attention: over all channels, or in groups of `group` (see `nn.channel_attention`).
      qk_norm: RMSNorm of queries and keys; channel-separated attention always has its own.
      drop_path: of the last layer of the stack.
    """

    kind: Literal["pdet_stack", "pdet_unet"] = "pdet_stack"
    hidden: int = 192
    depth: int = 8
    depths: tuple[int, ...] = (3, 3, 2)
    heads: int = 6
    attention: Literal["standard", "channel_separated"] = "standard"
    attention_impl: str = "reference"
    norm_impl: str = "reference"
    group: int = 24
    qk_norm: Literal["rms", "none"] = "rms"
    drop_path: float = 0.1


@dataclass(frozen=True)
class ConditioningConfig:
    """Test-time conditioning (TTC): the best of some corrected candidates, chosen for each sample by a reward.

    Attributes:
      candidates: of a step; 0 leaves it out.
      horizon: steps that the reward looks ahead, from the best `beam` candidates, each discounted by `discount`.
      tau: range of the corrector's time.
      noise: standard deviation of what is added to a candidate, by the steps that it looks ahead; the last entry
        stands for all further ones, () for none.
      early_stop_margin: a candidate that leads the next one by more is chosen without looking ahead; 0 for never.
      max_evaluations: of the reward, for a sample; a hard cap.
      weights: of mass, energy and negativity in the reward.
      reward: `mass` knows what Burgers conserves; `faithful` is upstream's sum over density and energy.
    """

    candidates: int = 8
    beam: int = 3
    horizon: int = 1
    discount: float = 0.9
    tau: tuple[float, float] = (0.15, 0.85)
    noise: tuple[float, ...] = (0.08, 0.05, 0.02)
    max_evaluations: int = 150
    early_stop_margin: float = 0.0
    weights: tuple[float, float, float] = (1.0, 1.0, 0.5)
    reward: Literal["mass", "faithful"] = "mass"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the operator's loss; a weight without effect is refused.

    Attributes:
      spectral: of the squared difference of the amplitudes along the channels.
      rollout: of the error after `rollout_steps` steps.
      inverse: of the error of the decoded field against the true one. It is 0 for `inverse_warmup` steps, then
        rises to its value in as many, and never above `inverse_cap`. Upstream's did not reach the operator.
    """

    spectral: float = 0.01
    rollout: float = 0.1
    rollout_steps: int = 2
    inverse: float = 0.0
    inverse_warmup: int = 0
    inverse_cap: float = 0.05


@dataclass(frozen=True)
class StageConfig:
    """One stage's length and rates; all else of its optimiser is as `optim` says."""

    steps: int = 0  # 0: the stage is left out
    learning_rate: float = 3e-4
    weight_decay: float = 0.015
    end_fraction: float = 0.05


@dataclass(frozen=True)
class BurgersModel:
    """All parts, and the stages besides the operator's own, which `training` and `optim` describe."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    core: CoreConfig = field(default_factory=CoreConfig)
    residual_gain: Literal["one", "zero"] = (
        "one"  # where what is added to the tokens starts: operator, corrector
    )
    conditioned_on: Literal["dt", "dt_and_viscosity"] = "dt_and_viscosity"  # what the operator is told
    loss: LossConfig = field(default_factory=LossConfig)
    autoencoder: StageConfig = field(default_factory=StageConfig)
    corrector: StageConfig = field(default_factory=StageConfig)
    distill: StageConfig = field(default_factory=StageConfig)
    # What the corrector is brought to: its own mean over tau, or nothing at all, as upstream's loss has it.
    distill_to: Literal["its_mean", "faithful_zero"] = "its_mean"
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)


@dataclass(frozen=True)
class BurgersData:
    """Where trajectories come from, and how they are cut into windows of frames.

    Attributes:
      source: `generated`; `pdebench` files with the benchmark's names; `converted` files or shards of
        {train,val,test}; `operator`: the small layout of inputs, outputs and one viscosity.
      train, val: files or folders, comma-separated; of `pdebench` `val` may be empty: the first 10 % are held out.
      viscosities: of generated data; the epsilon of u_t + (u^2/2)_x = epsilon/pi u_xx. One number for files that
        do not say theirs.
      cells: of the grid after taking every `space_stride`-th.
      time_stride: frames between input and target.
      starts: of windows: at every `time_stride`-th frame, as the document counts them, or at every frame.
      frames: of a generated trajectory, after the initial one.
      interval: time between frames; of files, if they do not say it.
      trajectories, held_out: of generated data, for each viscosity.
      seed: of the generator.
      rollout: steps of an evaluated roll-out.
    """

    source: Literal["generated", "pdebench", "converted", "operator"] = "generated"
    train: str = ""
    val: str = ""
    viscosities: tuple[float, ...] = (0.001, 0.1)
    cells: int = 1024
    space_stride: int = 1
    time_stride: int = 2
    starts: Literal["strided", "every_frame"] = "strided"
    frames: int = 200
    interval: float = 0.01
    trajectories: int = 1024
    held_out: int = 128
    seed: int = 2025
    rollout: int = 5
    eval_windows: int = 256
