"""jaxablate: declare, check, plan, run and report ablation studies in JAX."""

__version__ = "0.1.0"
