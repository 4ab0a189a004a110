"""Prompts -> condition tokens, by a frozen encoder: a multimodal language model, as VIMI, or a CLIP."""
