"""Read Llama checkpoints, decide which sublayers go, and measure. ``export`` builds on this, never the reverse."""

from pruner._version import __version__
from pruner.checkpoint import Checkpoint, open_checkpoint
from pruner.errors import MachineError, PruneAttnError
from pruner.plan import PruningPlan

__all__ = ["Checkpoint", "MachineError", "PruneAttnError", "PruningPlan", "__version__", "open_checkpoint", "register"]


def register() -> None:
    """Teach transformers' Auto classes the pruned models, so that they load without ``trust_remote_code``.

    Imports torch and transformers; importing ``pruner`` alone imports neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from pruner.nemotron_nas.configuration_pruned_llama import PrunedLlamaConfig
    from pruner.nemotron_nas.modeling_pruned_llama import DeciLMForCausalLM

    AutoConfig.register(PrunedLlamaConfig.model_type, PrunedLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(PrunedLlamaConfig, DeciLMForCausalLM, exist_ok=True)
    # save_pretrained then writes the two files of code beside the weights, as the converted directory has them
    PrunedLlamaConfig.register_for_auto_class()
    DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
