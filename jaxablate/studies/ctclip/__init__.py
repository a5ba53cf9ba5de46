"""CT-CLIP: contrastive chest-CT and report training, flash attention x RMSNorm x SwiGLU."""
