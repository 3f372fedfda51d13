"""CLIP's vision transformer (arXiv 2103.00020)."""

from parrot_sys.towers.tower import Pixels, TensorNames, Tower, Transformer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ENCODER_NAMES = TensorNames(
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    cls="embeddings.class_embedding",
    pre_norm="pre_layrnorm",  # the released name, letter for letter
    final_norm="post_layernorm",
    layer="encoder.layers.{}",
    norm1="layer_norm1",
    norm2="layer_norm2",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    passed_over=("embeddings.position_ids",),
)
"""Names that SigLIP shares but for the CLS row and the first norm, which it does not have."""

TOWER = Tower(
    name="clip",
    pixels=Pixels(mean=CLIP_MEAN, std=CLIP_STD, crop=True),
    transformer=Transformer(
        model_type="clip_vision_model",
        names=ENCODER_NAMES,
        patch_size=32,
        activation="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    known={"clip-vit-large-patch14-336": {}, "clip-vit-large-patch14": {"image_size": 224}},
)
