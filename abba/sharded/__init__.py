"""ZeRO-3: the only room that imports deepspeed."""
