"""Autoscaling policy under the import path that users' Ray Serve files contain."""

from reward_service.scheduler.autoscaling import PairsPerReplica

__all__ = ["PairsPerReplica"]
