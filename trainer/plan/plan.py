"""Plan of an iteration: memory, FLOPs and traffic, estimated before anything is loaded.

The networks are built on the meta device and run once, with one image, through the functions that training
uses; allocations and FLOPs of each operator are counted and multiplied. Not counted: workspace of kernels,
fragmentation of the allocator, and the CUDA context (about half a GB together).
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.config import TrainerConfig
from trainer.plan.meta import Blueprint, Meter, draft, metered, size_bytes
from trainer.rl.diffusion import trainable_steps
from trainer.rl.karlo import Condition, enable_activation_checkpointing
from trainer.rl.sampler import TEXT_CACHE


@dataclass(frozen=True)
class Cost:
    """Cost of one image in one pass, or of one transition in the update."""

    flops: int
    peak_bytes: int  # activations


@dataclass
class Plan:
    """Cost of one iteration of one process, in bytes and FLOPs (a multiply-add is two)."""

    counts: dict[str, int]
    parameters: dict[str, int]
    weights_bytes: dict[str, int]  # by network; lora: parameters, gradient, optimizer state and EMA
    kept_bytes: dict[str, int]  # data that an iteration collects
    activations_bytes: dict[str, int]  # peak, by stage
    peak_bytes: dict[str, int]  # total peak, by part of the iteration
    flops: dict[str, int]
    traffic_bytes: dict[str, int]
    device: str
    device_bytes: int | None  # its memory; None if this machine has no such device
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def make_plan(config: TrainerConfig, evaluators: int, processes: int = 1) -> Plan:
    """Estimate one iteration for each of `processes`.

    Args:
        config: the run's configuration
        evaluators: number of evaluators with a weight
        processes: number that share an iteration

    Raises:
        ConfigError: the networks' configurations are missing or damaged
    """
    blueprint = draft(config)
    counts = _counts(config, evaluators, processes)
    costs = _costs(blueprint, config)
    lora = sum(weight.numel() for weight in blueprint.policy.lora.values())
    weights = {name: size_bytes(network) for name, network in blueprint.networks.items()}
    weights["decoder"] -= 4 * lora
    weights["lora"] = 5 * 4 * lora  # parameters, gradient, two moments, EMA
    kept = _kept(blueprint, config, counts)
    activations = _activations(costs, config, counts)
    idle = ("text_encoder", "text_proj", "prior", "super_res_first", "super_res_last")
    offloaded = sum(weights[name] for name in idle) if config.memory.offload == "idle" else 0
    always = sum(weights.values()) + sum(kept.values())
    sampling = max(size for stage, size in activations.items() if stage != "update")
    plan = Plan(
        counts=counts,
        parameters={name: _numbers(network) for name, network in blueprint.networks.items()} | {"lora": lora},
        weights_bytes=weights,
        kept_bytes=kept,
        activations_bytes=activations,
        peak_bytes={
            "drawing": always - kept["transitions"] + sampling,
            "update": always - offloaded + activations["update"],
        },
        flops=_flops(costs, config, counts),
        traffic_bytes={
            "images to the scorer": counts["pictures"] * _image_bytes(blueprint, config),
            "networks to the CPU and back": 2 * offloaded,
        },
        device=config.device,
        device_bytes=device_memory(config.device),
    )
    plan.parameters["decoder"] -= lora
    plan.warnings.extend(_warnings(plan, config, processes))
    return plan


# --------------------------------------------------------------------------------------------- counting


def _counts(config: TrainerConfig, evaluators: int, processes: int) -> dict[str, int]:
    """Return the counts of the process with the largest share."""
    rollout, update = config.rollout, config.update
    prompts = math.ceil(rollout.prompts_per_iteration / processes)
    images = prompts * rollout.images_per_prompt
    first, last = update.train_steps or trainable_steps(config.sampling.decoder_steps)
    steps = min(update.steps_per_image, last - first + 1)
    all_transitions = rollout.prompts_per_iteration * rollout.images_per_prompt * steps
    return {
        "prompts": prompts,
        "pictures": images,
        "image embeddings": images if rollout.share.prior == "image" else prompts,
        "transitions": images * steps,
        "optimizer steps": math.ceil(all_transitions / (update.micro_batch * update.accumulate)),
        "requests to the scorer": math.ceil(images / config.sampling.micro_batch),
        "scores": images * evaluators,
    }


def _kept(blueprint: Blueprint, config: TrainerConfig, counts: dict[str, int]) -> dict[str, int]:
    """Return bytes of the collected data. Trajectories and conditions count twice: joining copies them."""
    unet = blueprint.decoder.config
    latent = 4 * unet.in_channels * unet.sample_size**2
    steps = config.sampling.decoder_steps
    condition = sum(field.nbytes for field in _condition(blueprint, config))
    width = blueprint.text_encoder.config.hidden_size
    text = blueprint.tokens * width * blueprint.text_encoder.dtype.itemsize
    return {
        "trajectories": 2 * counts["pictures"] * (3 * steps + 1) * latent,
        "conditions": 2 * counts["pictures"] * condition,
        "transitions": counts["transitions"] * (4 * latent + condition),
        "texts": TEXT_CACHE * text,
    }


def _activations(costs: dict[str, Cost], config: TrainerConfig, counts: dict[str, int]) -> dict[str, int]:
    sampled = min(config.sampling.micro_batch, counts["pictures"])
    embeddings = min(sampled, counts["image embeddings"])
    replayed = min(config.update.micro_batch, counts["transitions"])
    rows = {"text": embeddings, "prior": embeddings, "replay": replayed, "update": replayed}
    return {
        stage: cost.peak_bytes * rows.get(stage, sampled)
        for stage, cost in costs.items()
        if stage != "replay"
    }


def _flops(costs: dict[str, Cost], config: TrainerConfig, counts: dict[str, int]) -> dict[str, int]:
    sampling, images = config.sampling, counts["pictures"]
    per_step = images * costs["super-resolution"].flops
    recomputed = config.update.recompute_old
    if recomputed is None:
        recomputed = config.policy_precision != "float32"
    steps = counts["optimizer steps"]
    replays = (steps - 1) / steps * recomputed + (config.objective.kl_to_base > 0)
    finished = config.rollout.reward_stage == "super_resolution"
    return {
        "text": counts["prompts"] * costs["text"].flops,
        "prior": counts["image embeddings"] * sampling.prior_steps * costs["prior"].flops,
        "decoder": images * sampling.decoder_steps * costs["decoder"].flops,
        "super-resolution": finished * sampling.super_res_steps * per_step,
        "update": counts["transitions"] * costs["update"].flops,
        "old and base replays": int(counts["transitions"] * replays * costs["replay"].flops),
    }


def _numbers(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _image_bytes(blueprint: Blueprint, config: TrainerConfig) -> int:
    """Return the bytes of an image as the client sends it, raw uint8."""
    small = config.rollout.reward_stage == "decoder"
    network = blueprint.decoder if small else blueprint.super_res_first
    return 3 * int(network.config.sample_size) ** 2


# ---------------------------------------------------------------------------------- running on meta


def _costs(blueprint: Blueprint, config: TrainerConfig) -> dict[str, Cost]:
    """Run one image through one step of each stage, and one transition through the update."""
    if config.update.gradient_checkpointing:
        enable_activation_checkpointing(blueprint.decoder)
    with metered() as meter:
        with torch.no_grad():
            costs = {
                "text": _run(meter, lambda: blueprint.text_encoder(_zeros(1, blueprint.tokens).long())),
                "prior": _run(meter, lambda: _prior(blueprint, config)),
                "decoder": _run(meter, lambda: _replay(blueprint, config)),
                "super-resolution": _run(meter, lambda: _super_resolution(blueprint)),
            }
        costs["replay"] = costs["decoder"]
        costs["update"] = _run(meter, lambda: _replay(blueprint, config).mean.sum().backward())
    return costs


def _run(meter: Meter, work: Any) -> Cost:
    meter.restart()
    before = meter.held_bytes
    work()
    return Cost(meter.flops, meter.peak_bytes - before)


def _prior(blueprint: Blueprint, config: TrainerConfig) -> None:
    rows = 2 if config.sampling.prior_guidance > 1 else 1
    width, dtype = blueprint.prior.config.embedding_dim, blueprint.prior.dtype
    blueprint.prior(
        _zeros(rows, width, dtype=dtype),
        timestep=_zeros(1).long(),
        proj_embedding=_zeros(rows, width, dtype=dtype),
        encoder_hidden_states=_zeros(rows, blueprint.tokens, width, dtype=dtype),
        attention_mask=_zeros(rows, blueprint.tokens, dtype=torch.bool),
    )


def _replay(blueprint: Blueprint, config: TrainerConfig) -> Any:
    unet = blueprint.decoder.config
    x_t = _zeros(1, unet.in_channels, unet.sample_size, unet.sample_size)
    condition = _condition(blueprint, config)
    return blueprint.policy.replay(x_t, _zeros(1).long(), condition, config.update.guidance_gradient)


def _super_resolution(blueprint: Blueprint) -> None:
    unet = blueprint.super_res_first
    size = unet.config.sample_size
    unet(_zeros(1, unet.config.in_channels, size, size, dtype=unet.dtype), timestep=_zeros(1).long())


def _condition(blueprint: Blueprint, config: TrainerConfig) -> Condition:
    """Return the condition of one image."""
    projection = blueprint.text_proj
    dtype, tokens = projection.dtype, blueprint.tokens + projection.clip_extra_context_tokens
    width, time = projection.config.cross_attention_dim, projection.config.time_embed_dim

    def branch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _zeros(rows, tokens, width, dtype=dtype),
            _zeros(rows, time, dtype=dtype),
            _zeros(rows, tokens, dtype=torch.bool),
        )

    return Condition(*branch(1), *branch(1 if config.sampling.decoder_guidance > 1 else 0))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


# --------------------------------------------------------------------------------------------- device


def device_memory(name: str) -> int | None:
    """Return the bytes of a device's memory (of the machine's for "cpu"); None if there is no such device."""
    if name == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if name.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.device(name)).total_memory)
    return None


def _warnings(plan: Plan, config: TrainerConfig, processes: int) -> list[str]:
    found = []
    sharing = processes if config.device == "cpu" else 1
    part, most = max(plan.peak_bytes.items(), key=lambda item: item[1])
    if plan.device_bytes is not None and most * sharing > plan.device_bytes:
        found.append(
            f"the {part} needs {_size(most * sharing)} and {plan.device} has {_size(plan.device_bytes)}: "
            + _REMEDIES[part]
        )
    if config.policy_precision != "float32" and plan.counts["optimizer steps"] > 1:
        found.append(
            "a bfloat16 decoder rounds by more than a small update changes it, so ratios are noisy after the "
            f"first of the {plan.counts['optimizer steps']} optimizer steps of an iteration: raise "
            "update.accumulate until there is one, or set decoder_precision=float32"
        )
    return found


_REMEDIES = {
    "drawing": "set a smaller sampling.micro_batch, or precision=bfloat16",
    "update": "set update.gradient_checkpointing=true, memory.offload=idle or a smaller update.micro_batch",
}


# --------------------------------------------------------------------------------------------- output


def show(plan: Plan, console: Console, *, as_json: bool = False) -> None:
    """Print the plan as tables, or as JSON."""
    if as_json:
        console.print_json(json.dumps(plan.as_dict()))
        return
    networks = _table("Weights", "network", "parameters", "memory")
    for name, size in plan.weights_bytes.items():
        networks.add_row(name, f"{plan.parameters[name] / 1e6:,.2f} M", _size(size))
    memory = _table("Memory", "what", "bytes")
    for name, size in {**plan.kept_bytes, **_prefixed("activations, ", plan.activations_bytes)}.items():
        memory.add_row(name, _size(size))
    for name, size in plan.peak_bytes.items():
        memory.add_row(
            f"peak while {'sampling' if name == 'drawing' else 'updating'}", _size(size), style="bold"
        )
    work = _table("Arithmetic", "part", "TFLOP", "share")
    total = sum(plan.flops.values())
    for name, flops in {**plan.flops, "an iteration": total}.items():
        work.add_row(name, f"{flops / 1e12:,.4g}", f"{flops / total:.1%}")
    counts = _table("An iteration of one process", "what", "number")
    for name, count in plan.counts.items():
        counts.add_row(name, f"{count:,}")
    for name, size in plan.traffic_bytes.items():
        counts.add_row(name, _size(size))
    for table in (counts, networks, memory, work):
        console.print(table)
    for warning in plan.warnings:
        console.print(f"Warning: {warning}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _prefixed(prefix: str, values: dict[str, int]) -> dict[str, int]:
    return {prefix + name: value for name, value in values.items()}


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"
