"""Training recipes, one per paper, looked up by name."""

from medlib.methods.base import SCALES, Method, Stage, Streams, Work, available, build, register

__all__ = ["SCALES", "Method", "Stage", "Streams", "Work", "available", "build", "register"]
