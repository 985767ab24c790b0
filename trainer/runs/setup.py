"""Load the models of a run and check that its settings fit them."""

import hashlib
from collections.abc import Sequence

import diffusers
import torch
import transformers

from trainer.config import ConfigError, TrainerConfig, flatten
from trainer.rl.karlo import enable_activation_checkpointing, load_karlo
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rewards import Scorer
from trainer.rl.sampler import ImageSampler
from trainer.runtime.distributed import Processes


def check_prompts_per_process(config: TrainerConfig, prompts: Sequence[str], processes: Processes) -> None:
    """Raise ConfigError if an iteration has fewer prompts than there are processes to share them."""
    groups = min(config.rollout.prompts_per_iteration, len(prompts))
    if groups < processes.world_size:
        raise ConfigError(
            f"trainer.rollout.prompts_per_iteration: {groups} prompts cannot be shared among "
            f"{processes.world_size} processes of at least one each; raise it or start fewer processes"
        )


def check_processes_agree(
    config: TrainerConfig, scorer: Scorer, policy: DecoderPolicy, processes: Processes
) -> None:
    """Raise JobError if a process has another configuration, scorer or adapter than the main one."""
    remedy = "start all processes with the same command and files"
    processes.check_same("configuration", flatten(config.model_dump(mode="json")), remedy)
    processes.check_same("scorer", scorer.identity, "point all processes at the same service")
    processes.check_same("adapter", {"LoRA": adapter_checksum(policy)}, remedy)


def check_evaluators(config: TrainerConfig, scorer: Scorer) -> None:
    """Raise ConfigError if a weight or the guard names an evaluator that the service does not have."""
    required = {*config.objective.weights, *config.composite_weights, config.guard.evaluator} - {None}
    unknown = sorted(map(str, required - set(scorer.evaluators)))
    if unknown:
        raise ConfigError(
            f"trainer.objective.weights: the service has no evaluator {', '.join(unknown)} (named there, in "
            f"evaluation.weights or as guard.evaluator); it has {', '.join(scorer.evaluators)}"
        )


def adapter_checksum(policy: DecoderPolicy) -> str:
    """Return a hash of the adapter's bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(policy.lora.items()):
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_sampler(config: TrainerConfig, device: str | None = None) -> ImageSampler:
    """Load Karlo, its policy without an adapter, on `device` or the configured one. Raises ConfigError."""
    device = device or config.device
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _check_device(device)
    quiet_libraries()
    karlo = load_karlo(
        config.karlo, device, getattr(torch, config.precision), getattr(torch, config.policy_precision)
    )
    if config.update.gradient_checkpointing:
        enable_activation_checkpointing(karlo.decoder)
    if config.compile:
        karlo.decoder.compile()
    policy = DecoderPolicy(
        karlo.decoder,
        karlo.decoder_scheduler,
        steps=config.sampling.decoder_steps,
        guidance=config.sampling.decoder_guidance,
    )
    return ImageSampler(karlo, policy, config.sampling, offload=config.memory.offload)


def _check_device(name: str) -> None:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device: {name}, but torch finds no GPU here; set trainer.device=cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"trainer.device: {name!r} is not a device of this machine; set cpu or cuda"
        ) from error


def quiet_libraries() -> None:
    """Show only errors of diffusers and transformers: their notes on loading do not concern our users."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
