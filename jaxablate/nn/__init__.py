"""The building blocks that studies ablate: each slot has one home here."""
