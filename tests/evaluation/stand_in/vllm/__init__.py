"""What the project uses of vLLM, where vLLM is not installed: it pins a torch and a transformers of its own.

Names, signatures and rules are those of vLLM 0.33 (entrypoints/llm.py, sampling_params.py, lora/request.py,
config/lora.py); an argument that it does not know is a TypeError. It computes with transformers, and with stock PEFT
from the LoRA files that it is given. What was asked of it stands in LLM.made and LLM.asked.
"""

import json
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

__version__ = "0.33.0+stand.in"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    detokenize: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    made: list[dict] = []
    asked: list[dict] = []

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        load_format: str = "auto",
        generation_config: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        LLM.made.append({key: value for key, value in locals().items() if key != "self"})
        if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"max_lora_rank {max_lora_rank} is not allowed")
        if tensor_parallel_size > 2:
            raise RuntimeError("Engine core initialization failed. See root cause above.\nmore of it")
        with socket.socket() as probe:  # its workers' process group, on one GPU too
            probe.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        next(torch.distributed.rendezvous(url, 0, 1, timeout=timedelta(seconds=5)))
        assert load_format == "safetensors" and generation_config == "vllm" and skip_tokenizer_init
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
        self._model.generation_config = GenerationConfig()
        self._longest, self._most, self._rank = max_model_len, max_num_seqs, max_lora_rank if enable_lora else 0

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None) -> list[RequestOutput]:
        """In the order of the prompts. A stop token is among the token ids, as vLLM has it."""
        LLM.asked.append({"prompts": len(prompts), "lora": lora_request})
        if lora_request is not None and not isinstance(self._model, PeftModel):
            config = json.loads((Path(lora_request.lora_path) / "adapter_config.json").read_text())
            assert config["peft_type"] == "LORA" and config["bias"] == "none"
            assert config["r"] <= self._rank, "LoRA rank is greater than max_lora_rank"
            self._model = PeftModel.from_pretrained(self._model, lora_request.lora_path).eval()
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _answer(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        assert params.temperature == 0.0 and not params.detokenize
        assert len(ids) + params.max_tokens <= self._longest
        stops = params.stop_token_ids
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=params.max_tokens, eos_token_id=stops, pad_token_id=stops[0]
        )
        with torch.inference_mode():
            output = self._model.generate(input_ids=torch.tensor([ids]), generation_config=settings)
        answer = output[0, len(ids) :].tolist()
        return RequestOutput(ids, [CompletionOutput(0, "", answer, "stop" if answer[-1] in stops else "length")])
