"""ABBA adapters for large language models on DeepSpeed ZeRO-3."""

from abba.adapter.config import AdapterConfig
from abba.adapter.files import load_adapter, save_adapter
from abba.adapter.inject import InjectionReport, inject
from abba.adapter.linear import AbbaLinear

__version__ = "0.1.0"
__all__ = ["AbbaLinear", "AdapterConfig", "InjectionReport", "inject", "load_adapter", "save_adapter"]
