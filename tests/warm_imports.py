"""Imported once by the process that tests/warm.py forks from."""

import gc

import datasets  # noqa: F401
import peft  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import abba.evaluation.score
import abba.sharded.checkpoint
import abba.sharded.engine
import abba.sharded.process_group
import abba.training.data_report
import abba.training.dry_run
import abba.training.finish
import abba.training.loop
import abba.training.model
import abba.training.resume
import abba.training.start

abba.sharded.engine.import_muon()
gc.freeze()  # or each child's collections would touch, and so copy, all that it shares with the others
