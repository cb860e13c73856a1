"""The method: ABBA layers, their initialisation, injection and files. torch, safetensors, and PEFT for its methods."""
