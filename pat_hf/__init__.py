"""Prefix-aware attention for Transformers: shared prompts are computed, stored and read once.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pat")
out = model.generate(**inputs, past_key_values=pat_hf.PATCache(model))
"""

from pathlib import Path

_source = Path(__file__).parent
if not (_source / "kernels").is_dir():
    # In a checkout `kernels/` and `cache/` stand beside this folder; a wheel has them inside it.
    __path__.append(str(_source.parent))

from pat_hf.attention import register  # noqa: E402
from pat_hf.cache.page_pool import PoolExhausted  # noqa: E402
from pat_hf.cache.pat_cache import PATCache  # noqa: E402
from pat_hf.cache.report import Report  # noqa: E402
from pat_hf.enable import disable, enable, enabled  # noqa: E402
from pat_hf.hooks import install  # noqa: E402
from pat_hf.score import Scores, loglikelihoods  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "PATCache",
    "PoolExhausted",
    "Report",
    "Scores",
    "disable",
    "enable",
    "enabled",
    "loglikelihoods",
]

register()
install()
