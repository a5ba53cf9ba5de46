"""What one arm costs, before it is trained: parameters, FLOPs, memory on a device, hours.

    python -m jaxablate.estimate configs/ctclip.py:scale=paper --arm=baseline --target=h200

prints one JSON object, an `Estimate` of `facts`, which is all that may be imported without jax.
"""
