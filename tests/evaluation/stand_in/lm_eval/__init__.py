"""What the project uses of lm-evaluation-harness, where it is not installed: it brings forty packages.

Names, signatures and the form of the results are those of lm_eval 0.4.13 (evaluator.py, models/huggingface.py,
tasks/manager.py); an argument that it does not know is a TypeError. Its task, `first_word`, generates with the model.
"""

import numpy as np
import torch

asked: list[dict] = []


def simple_evaluate(
    model, *, tasks=None, limit=None, gen_kwargs=None, task_manager=None, log_samples=True, num_fewshot=None
):
    asked.append({"tasks": tasks, "limit": limit, "gen_kwargs": gen_kwargs, "path": task_manager.include_path})
    if "breaks" in tasks:
        raise ConnectionError("Couldn't reach 'somebody/data' on the Hub\nmore of it")
    if "large" in tasks:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore of it")
    samples = [
        {"doc_id": index, "doc": {"question": question}, "resps": [[model.generate(question, gen_kwargs)]], "acc": 1.0}
        for index, question in enumerate(["One and one?", "Two and two?", "Three?"][:limit])
    ]
    result = {"alias": "first_word", "acc,none": 0.75, "acc_stderr,none": 0.1, "brier,none": 0.5, "sample_len": 3}
    result |= {"exact_match,strict-match": np.float64(0.25), "exact_match,flexible-extract": 1}
    return {
        "results": {"first_word": result},
        "n-samples": {"first_word": {"original": 3, "effective": len(samples)}},
        "versions": {"first_word": 1.0},
        "samples": {"first_word": samples} if log_samples else {},
    }


class _LM:
    def __init__(self, pretrained, tokenizer, batch_size):
        assert not isinstance(pretrained, str) and batch_size >= 1
        self.model, self.tokenizer = pretrained, tokenizer

    def generate(self, text, gen_kwargs):
        ids = torch.tensor([self.tokenizer(text).input_ids])
        output = self.model.generate(ids, max_new_tokens=(gen_kwargs or {}).get("max_gen_toks", 4), do_sample=False)
        return self.tokenizer.decode(output[0, ids.shape[1] :])
