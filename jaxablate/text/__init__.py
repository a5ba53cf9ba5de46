"""Text and tokens, as any study of language uses them. Imports no jax."""
