"""Adapters: reward functions for other trainers. Each factory takes a client and returns the callable.

====================  ===================================================  ================================
factory               returned function                                    trainers
====================  ===================================================  ================================
`flow_grpo_reward`    `(images, prompts, metadata) -> (scores, {})`        Flow-GRPO, DanceGRPO's descendants
`ddpo_reward`         `(images, prompts, metadata) -> (rewards, scores)`   ddpo-pytorch, TRL's DDPO
`trl_reward`          `(prompts, completions, **columns) -> list[float]`   TRL's GRPO and its descendants
`openrlhf_reward`     `(queries, prompts, labels) -> dict`                 OpenRLHF
====================  ===================================================  ================================

Images that cannot be scored raise the client's exceptions; no adapter ever substitutes a reward. None imports
torch: a trainer that expects tensors gets tensors, because it has imported torch itself.
"""

from reward_service.adapters.ddpo import ddpo_reward
from reward_service.adapters.flow_grpo import flow_grpo_reward
from reward_service.adapters.openrlhf import openrlhf_reward
from reward_service.adapters.trl import trl_reward

__all__ = ["ddpo_reward", "flow_grpo_reward", "openrlhf_reward", "trl_reward"]
