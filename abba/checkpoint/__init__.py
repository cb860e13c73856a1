"""Sharded checkpoints as files: one process reads them without deepspeed, a GPU or a process group."""
