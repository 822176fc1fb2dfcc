"""LiST: few-shot classification by prompts, adapters and re-weighted self-training."""
