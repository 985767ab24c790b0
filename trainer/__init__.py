"""The trainer: improves a LoRA on Karlo's decoder from the rewards of the scoring service."""
