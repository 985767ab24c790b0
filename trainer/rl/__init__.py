"""Reinforcement learning: policy, objective, rollout and update."""
