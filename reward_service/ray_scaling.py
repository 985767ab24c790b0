"""Autoscaling policy under the name that Serve configuration files hold."""

from reward_service.scheduler.autoscaling import PairsPerReplica

__all__ = ["PairsPerReplica"]
