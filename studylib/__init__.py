"""Rerun the claims of LLM-QAT, QLoRA and L4Q on your own model, with intervals."""
