"""Models and scores: CLIP towers, evaluators, preprocessing and weights."""
