"""Imported once by the process that tests/warm.py forks from."""

import gc

import datasets  # noqa: F401
import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # torch's compiler: seconds, when an engine starts
import peft  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import abba.evaluation.score
import abba.sharded.checkpoint
import abba.sharded.process_group
import abba.training.data_report
import abba.training.dry_run
import abba.training.finish
import abba.training.loop
import abba.training.model
import abba.training.resume
import abba.training.start  # noqa: F401

gc.freeze()  # or each child's collections would touch, and so copy, all that it shares with the others
