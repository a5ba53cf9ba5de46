"""What a study will take before it is launched, and in which order and where its cohorts are best trained."""
