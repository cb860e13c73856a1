"""What a recipe's `deepspeed:` section may not set, and where to set it instead. Imports nothing."""

# What else a `deepspeed:` section may hold at its top. DeepSpeed itself ignores a name it does not know.
FREE_KEYS = (
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)
TRACKERS = ("tensorboard", "wandb")  # which need a package of their name
# The others are sections.
SWITCHES = ("dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown")
# Keys of a DeepSpeed configuration that follow from the recipe; `deepspeed:` may not set them a second time. DeepSpeed
# takes what begins with stage3_ without it too.
OWNED_KEYS = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.per_device_train_batch_size",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and the number of ranks",
    "gradient_clipping": "set train.max_grad_norm",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype; fp16 training is not supported",
    "optimizer": "set train.learning_rate and its neighbours; the optimizer is AdamW",
    "scheduler": "set train.lr_scheduler_type",
    "activation_checkpointing": "set train.gradient_checkpointing",
    "data_types": "gradients are accumulated in fp32",
    "communication_data_type": "gradients are reduced in fp32",
    "zero_optimization.stage": "the base is always sharded, stage 3",
    "zero_optimization.stage3_param_persistence_threshold": "replicated are the factors and the 1-D tensors, by name",
    "zero_optimization.mics_shard_size": "sharded loading fills zero_hpz_partition_size's second copy: use that",
    "zero_optimization.leaf_module": "whole layers gathered at once are let go before their backward is done",
    "zero_optimization.stage3_module_granularity_threshold": "it gathers whole layers at once, see leaf_module",
    "zero_optimization.zero_quantized_weights": "it would quantise the frozen base silently",
    "zero_optimization.zero_quantized_nontrainable_weights": "it would quantise the frozen base silently",
    "zero_optimization.zero_quantized_gradients": "gradients are reduced in fp32",
    "zero_optimization.cpu_offload": "an old name for offload_optimizer, which is not supported",
    "zero_optimization.cpu_offload_param": "an old name for offload_param: use that",
    "zero_optimization.zenflow": "it splits the update of the optimizer; checkpoints read its state in place",
    "zero_optimization.offload_optimizer": "the optimizer state of an adapter is small; checkpoints read it in place",
}
