"""A linear layer and the cross-entropy of its logits, as one operation: the logits need not exist.

The specification lives in the docstring of `linear_cross_entropy`; `reference` is the oracle of the others,
`cases` the shapes that tests and benchmarks share.
"""

from jaxablate_kernels import dispatch
from jaxablate_kernels.cross_entropy.spec import (
    Bias,
    CrossEntropySpec,
    Features,
    Static,
    Targets,
    TokenLosses,
    Weights,
)

__all__ = ["CrossEntropySpec", "TokenLosses", "linear_cross_entropy"]


def linear_cross_entropy(
    x: Features,
    w: Weights,
    targets: Targets,
    *,
    impl: str,
    bias: Bias | None = None,
    ignore_index: int = -100,
    z_loss: float | int = 0.0,
    softcap: float | int | None = None,
) -> TokenLosses:
    """Negative log-likelihood of each token's target under softmax(x w + bias), and its z-loss.

        logits[n,:] = x[n,:] w + bias,   or   softcap * tanh((x[n,:] w + bias) / softcap)
        lse[n] = log sum_v exp(logits[n,v])
        nll[n] = lse[n] - logits[n, targets[n]],   z[n] = z_loss * lse[n]^2

    The z-loss keeps the normaliser near 1 (Chowdhery et al. 2022, section 5; they use 1e-4).  A token
    whose target is `ignore_index` has both losses 0 and passes no gradient, also if all tokens are such.
    A target that is neither that nor in [0, V) makes its own nll NaN and with it the gradient: a shifted
    vocabulary must show.  What the mean is taken over is the caller's choice.

    The matrix products take their operands in x's type, w and the gradient of the logits included, and sum
    in float32; all else is float32.  The gradient of w is summed in float32 over all tokens and rounded to
    w's type once.  float64 stays float64.  The same program gives the same bits on every call.

    Reverse-mode differentiable in x, w and bias, including under vmap, jit, remat and shard_map over the
    tokens; implementations other than ``reference`` have no forward mode and no second derivative.

    Args:
        x: features (N, D), float32, bfloat16 or float16.
        w: weights (D, V), any of these types.
        targets: int32 (N,).
        impl: an implementation (``reference``, ``chunked``) or ``auto``.
        bias: (V,), any float type.
        ignore_index: the target that does not count; a constant of the program, like the next two.
        z_loss: factor of the z-loss.
        softcap: bound of the logits' size, applied after the bias; None for none.

    Returns:
        `TokenLosses`, both (N,) in float32.

    Raises:
        ValueError: shapes or types that do not fit together, or an unknown `impl`.
        KernelUnsupported: the named implementation cannot run this problem.
    """
    spec = CrossEntropySpec.of(
        x, w, targets, bias=bias, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
    )
    static = Static(ignore_index, float(z_loss), None if softcap is None else float(softcap))
    return dispatch.choose("cross_entropy", impl, spec).call(x, w, targets, bias=bias, static=static)
