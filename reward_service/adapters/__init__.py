"""The service as reward functions of other trainers: each maker takes a client and gives what they call.

==========================  ===================================================  ===========================
maker                       what it gives                                        who calls so
==========================  ===================================================  ===========================
`flow_grpo_reward`    `(images, prompts, metadata) -> (scores, {})`      Flow-GRPO, DanceGRPO's kin
`ddpo_reward`         `(images, prompts, metadata) -> (rewards, scores)` ddpo-pytorch, TRL's DDPO
`trl_reward`          `(prompts, completions, **columns) -> list[float]` TRL's GRPO and its kin
`openrlhf_reward`     `(queries, prompts, labels) -> dict`               OpenRLHF
==========================  ===================================================  ===========================

What cannot be scored raises the client's exceptions; no adapter ever makes up a reward. None imports torch:
where a trainer expects a tensor it gets one, because that trainer has torch loaded.
"""

from reward_service.adapters.ddpo import ddpo_reward
from reward_service.adapters.flow_grpo import flow_grpo_reward
from reward_service.adapters.openrlhf import openrlhf_reward
from reward_service.adapters.trl import trl_reward

__all__ = ["ddpo_reward", "flow_grpo_reward", "openrlhf_reward", "trl_reward"]
