"""Distributed training: process group, collectives, gradients and inference."""
