"""Adapters as features: how many there are of each representation, and what they are."""

from jaxablate.studies.lora_space.features.compute import dim_of_tensor, feature_dim, features

__all__ = ["dim_of_tensor", "feature_dim", "features"]
