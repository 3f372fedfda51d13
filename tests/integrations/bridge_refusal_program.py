"""Prints what our mappings say of a checkpoint that has all experts of a layer in one tensor (gpt-oss)."""

from __future__ import annotations

from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401  (before the stub)

import parrot_sys.megatron  # noqa: F401
from parrot_sys.megatron.runtime.initialize import initialize
from tests.megatron import te_stub

te_stub.install()
te_stub.newer_typing()

from megatron.bridge.models.gpt_oss.gpt_oss_bridge import GPTOSSBridge  # noqa: E402
from torch import nn  # noqa: E402

from parrot_sys.errors import ConfigError  # noqa: E402
from parrot_sys.integrations.megatron_bridge.experts import stacked_mappings  # noqa: E402


def main() -> None:
    """One line for each of our weights."""
    initialize()
    said = []
    for mapping in stacked_mappings(GPTOSSBridge().mapping_registry().get_all_mappings(), 4):
        try:
            mapping.resolve(("0",)).hf_to_megatron({}, nn.Module())
        except ConfigError as error:
            said.append(str(error))
    print(" | ".join(said), flush=True)


if __name__ == "__main__":
    main()
