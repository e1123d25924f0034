"""Coordinator and member: who is in a run. Pure state machines with thin shells; no tensors."""
