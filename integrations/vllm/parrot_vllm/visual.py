"""Tower, projector, router and experts: pixels and the text of a prompt -> rows of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group

from parrot_sys.errors import ConfigError
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import TensorMap, check_tensors
from parrot_sys.models.tower_maps import is_passed_over, tower_maps
from parrot_sys.modules.projector import Projector
from parrot_sys.modules.text_guided_moe import TextGuidedMoE
from parrot_sys.parallel import ExpertGroups
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.image_rows import projector_maps
from parrot_sys.systems.maps import is_carried
from parrot_sys.systems.parrot.system import moe_maps
from parrot_sys.systems.registry import system_of
from parrot_vllm.feature_cache import FeatureCache
from parrot_vllm.vision_transformer import VisionTransformer

_VISION_MODEL = "vision_model."


class Visual(nn.Module):
    """Tower, projector, router and experts, on the first pipeline stage.

    Its tensor-parallel ranks share the tower (`VisionTransformer`; a convolutional one is whole on each), the layers of
    the projector two by two, and the inner columns of each expert. All have the router, and all get the same rows.
    """

    def __init__(self, config: ParrotConfig, dtype: torch.dtype, cache_bytes: int, prefix: str = "") -> None:
        """
        Args:
            config: of the checkpoint.
            dtype: of parameters and rows.
            cache_bytes: of features that are kept, see `FeatureCache`.
            prefix: of the names of its layers in the engine.

        Raises:
            ConfigError: routes that are guided by a part of the prompt.
        """
        super().__init__()
        if config.moe.num_experts and config.moe.guidance != "prompt":
            raise ConfigError(
                f"moe.guidance={config.moe.guidance!r}: parrot-vllm guides routes by the whole prompt; serve this "
                "checkpoint with `parrot serve`"
            )
        vision, width = config.vision, config.llm.hidden_size
        self.config = config
        self.vision_tower: nn.Module = (
            EfficientNetLite0(with_mean=vision.select_feature == "cls_patch").to(dtype)
            if vision.tower.transformer is None
            else VisionTransformer(vision, dtype, f"{prefix}.vision_tower")
        )
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        self.projector = Projector(config.projector, vision.hidden_size, width, dtype=dtype, group=group)
        groups = ExpertGroups(tp=group, etp=group, joint=group)
        self.moe = TextGuidedMoE(config.moe, width, dtype=dtype, groups=groups) if config.moe.num_experts else None
        self.cache = FeatureCache(cache_bytes)

    @torch.no_grad()
    def forward(self, pixels: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        """Rows [V, H] of each picture.

        Args:
            pixels: [3, h, w] of n pictures.
            texts: [G, H] word embeddings of each picture's prompt.
        """
        dtype = self.projector[0].weight.dtype
        tower = self.vision_tower.encode if isinstance(self.vision_tower, VisionTransformer) else self.vision_tower
        features = torch.stack(self.cache.features(pixels, lambda new: tower(new.to(dtype)).to(dtype)))
        rows = self.projector(features)
        if self.moe is not None:
            ends = torch.tensor([len(text) for text in texts], device=rows.device).cumsum(0)
            starts = ends - torch.tensor([len(text) for text in texts], device=rows.device)
            rows, _ = self.moe(rows, torch.cat(list(texts)), starts, ends)
        return list(rows)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], tower_directory: Path | None, where: str) -> set[str]:
        """Fills everything from released tensors, and from those of a tower beside the checkpoint.

        Args:
            tensors: released names -> tensors, the decoder's not among them.
            tower_directory: of a tower that is not among `tensors`.
            where: of the checkpoint, for messages.

        Returns:
            Names of the parameters that were filled.

        Raises:
            CheckpointError: lists missing, unexpected and mis-shaped tensors.
        """
        config, key = self.config, system_of(self.config).tower_key
        maps = projector_maps(config) + (moe_maps(config) if self.moe is not None else [])
        inside = any(name.startswith(key) for name in tensors)
        if inside:
            maps += tower_maps(config.vision, "vision_tower.", key)
        used = {name: tensor for name, tensor in tensors.items() if not is_carried(name, config)}
        check_tensors(maps, {name: tuple(tensor.shape) for name, tensor in used.items()}, where)
        filled = self._fill(maps, used)
        if not inside:
            filled |= self._load_tower(tower_directory, where)
        return filled

    def _load_tower(self, directory: Path | None, where: str) -> set[str]:
        vision = self.config.vision
        directory = directory or (Path(vision.path) if vision.path else None)
        if directory is None:
            if not isinstance(self.vision_tower, EfficientNetLite0):
                raise ConfigError(f"{where}: no weights of the vision tower {vision.type} in it or beside it")
            self.vision_tower.load_state_dict(EfficientNetLite0.from_package().state_dict())
            return {f"vision_tower.{name}" for name, _ in self.vision_tower.named_parameters()}
        with TensorFiles(directory) as files:
            prefix = _VISION_MODEL if any(name.startswith(_VISION_MODEL) for name in files.names()) else ""
            maps = tower_maps(vision, "vision_tower.", prefix)
            names = [
                name
                for name in files.names()
                if name.startswith(prefix) and not is_passed_over(name.removeprefix(prefix), vision)
            ]
            check_tensors(maps, {name: files.shape(name) for name in names}, str(directory))
            return self._fill(maps, {name: files.tensor(name) for name in names})

    def _fill(self, maps: Sequence[TensorMap], tensors: Mapping[str, Tensor]) -> set[str]:
        """Fills parameters and buffers; blocks of the tower that never run are left out."""
        targets = dict([*self.named_parameters(), *self.named_buffers()])
        for entry in maps:
            if (target := targets.get(entry.name)) is not None:
                fill(target, entry.pack([tensors[name] for name in entry.keys]))
        return {entry.name for entry in maps if entry.name in targets}


def fill(target: Tensor, whole: Tensor) -> None:
    """Copies what this tensor-parallel rank holds of a tensor: vLLM's layers know their part, of others it is cut where
    the sizes differ."""
    if (loader := getattr(target, "weight_loader", None)) is not None:
        loader(target, whole)
        return
    ranks = get_tp_group()
    for dim, (size, wanted) in enumerate(zip(whole.shape, target.shape, strict=True)):
        if size != wanted:
            whole = whole.chunk(ranks.world_size, dim)[ranks.rank_in_group]
    target.copy_(whole)
