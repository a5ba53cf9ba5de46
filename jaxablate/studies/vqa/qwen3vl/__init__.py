"""Qwen3-VL (arXiv:2511.21631) for images and text: the model, its published weights, its images and prompts."""
