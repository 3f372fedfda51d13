"""EfficientNet-lite0 (arXiv 1905.11946), the small tower of the demo; its layers are in `parrot_sys.models`."""

from parrot_sys.towers.tower import Network, Pixels, Tower

TOWER = Tower(
    name="efficientnet_lite0",
    pixels=Pixels(mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0), rescale_factor=1.0),  # exactly
    network=Network(stride=32, width=1280, activation="relu6", flops=2 * 0.407e9),  # of its model card
)
