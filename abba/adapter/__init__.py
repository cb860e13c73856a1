"""The method: ABBA layers, their initialisation, injection and files. torch and safetensors only."""
