"""Tiny random networks of transformers with their image processors, written as ``save_pretrained`` writes them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray

NAMES = ("sky", "road", "car", "person", "tree", "wall")
THINGS = ("car", "person")
LABELS: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}

_SQUARE = {"height": 64, "width": 64}
_SHORT = {"shortest_edge": 64, "longest_edge": 128}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_WIDTHS: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_VIT: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
_FOUR: dict[str, Any] = {**_VIT, "num_hidden_layers": 4, "intermediate_size": 32}
_EOMT: dict[str, Any] = {
    **_VIT,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_queries": 12,
    "num_register_tokens": 1,
    "num_upscale_blocks": 1,
}
_SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "image_size": 64,
    "drop_path_rate": 0.0,
    "out_features": _STAGES,
}
_DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "num_queries": 12,
    "use_timm_backbone": False,
}
_MASKS: dict[str, Any] = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 12,
}
_ONEFORMER: dict[str, Any] = {
    **_MASKS,
    "conv_dim": 32,
    "mask_dim": 32,
    "text_encoder_width": 32,
    "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 64,
    "text_encoder_proj_layers": 1,
    "text_encoder_context_length": 20,
    "text_encoder_n_ctx": 4,
    "query_dec_layers": 1,
    "task_seq_len": 20,
    "max_seq_len": 20,
}
Made = tuple[Any, Any]
"""(network, processor)."""


def _resnet() -> Any:
    return hf.ResNetConfig(embedding_size=8, layer_type="basic", out_features=_STAGES, **_WIDTHS)


def _segformer() -> Made:
    config = hf.SegformerConfig(num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, **_WIDTHS, **LABELS)
    return hf.SegformerForSemanticSegmentation(config), hf.SegformerImageProcessor(size=_SQUARE)


def _upernet(backbone: Any, channels: int) -> Made:
    extra = {"hidden_size": 16, "auxiliary_in_channels": channels, "auxiliary_channels": 8}
    network = hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **extra, **LABELS))
    return network, hf.SegformerImageProcessor(size={"height": 64, "width": 96})


def _dpt() -> Made:
    sizes = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    return hf.DPTForSemanticSegmentation(hf.DPTConfig(**sizes, **_FOUR, **LABELS)), hf.DPTImageProcessor(size=_SQUARE)


def _beit() -> Made:
    heads = {"out_indices": [0, 1, 2, 3], "pool_scales": [1, 2, 3], "auxiliary_channels": 8}
    config = hf.BeitConfig(use_relative_position_bias=True, **heads, **_FOUR, **LABELS)
    return hf.BeitForSemanticSegmentation(config), hf.BeitImageProcessor(size=_SQUARE, do_center_crop=False)


def _data2vec() -> Made:
    heads = {"out_indices": [0, 1, 2, 3], "pool_scales": [1, 2, 3], "auxiliary_channels": 8}
    network = hf.Data2VecVisionForSemanticSegmentation(hf.Data2VecVisionConfig(**heads, **_FOUR, **LABELS))
    return network, hf.BeitImageProcessor(size=_SQUARE, do_center_crop=False)


def _mobilevit() -> Made:
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32], "aspp_out_channels": 16}
    network = hf.MobileViTForSemanticSegmentation(hf.MobileViTConfig(num_attention_heads=2, **sizes, **LABELS))
    return network, hf.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=_SQUARE)


def _mobilevitv2() -> Made:
    sizes = {"width_multiplier": 0.25, "aspp_out_channels": 16, "base_attn_unit_dims": [16, 24, 32]}
    network = hf.MobileViTV2ForSemanticSegmentation(hf.MobileViTV2Config(n_attn_blocks=[1, 1, 1], **sizes, **LABELS))
    return network, hf.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=_SQUARE)


def _mobilenet() -> Made:
    network = hf.MobileNetV2ForSemanticSegmentation(hf.MobileNetV2Config(depth_multiplier=0.35, **LABELS))
    return network, hf.MobileNetV2ImageProcessor(size={"height": 65, "width": 65}, do_center_crop=False)


def _sapiens() -> Made:
    layers = {"num_first_full_attention_layers": 1, "num_last_full_attention_layers": 1, "num_hidden_layers": 2}
    head = {"upsample_out_channels": [16, 16], "upsample_kernel_sizes": [4, 4], "conv_out_channels": [16]}
    sizes = {**_VIT, "image_size": [64, 48], "intermediate_size": 32, "num_key_value_attention_heads": 1}
    config = hf.Sapiens2Config(head_config={**head, "conv_kernel_sizes": [1]}, **layers, **sizes, **LABELS)
    return hf.Sapiens2ForSemanticSegmentation(config), hf.Sapiens2ImageProcessor(size={"height": 64, "width": 48})


def _tips() -> Made:
    outputs = {"out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False}
    vision = hf.Tipsv2VisionConfig(**{**_FOUR, "image_size": 56, "patch_size": 14}, **outputs)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    network = hf.Tipsv2DptForSemanticSegmentation(hf.Tipsv2DptConfig(backbone_config=vision, **sizes, **LABELS))
    return network, hf.Tipsv2DptImageProcessor(size={"height": 56, "width": 56})


def _mask2former() -> Made:
    sizes = {"feature_size": 32, "mask_feature_size": 32}
    config = hf.Mask2FormerConfig(backbone_config=hf.SwinConfig(**_SWIN), **sizes, **_MASKS, **LABELS)
    return hf.Mask2FormerForUniversalSegmentation(config), hf.Mask2FormerImageProcessor(size=_SHORT)


def _maskformer() -> Made:
    decoder = hf.DetrConfig(backbone_config=_resnet(), **_DETR)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    config = hf.MaskFormerConfig(backbone_config=_resnet(), decoder_config=decoder, **sizes, **LABELS)
    return hf.MaskFormerForInstanceSegmentation(config), hf.MaskFormerImageProcessor(size=_SHORT)


def _detr() -> Made:
    network = hf.DetrForSegmentation(hf.DetrConfig(backbone_config=_resnet(), **_DETR, **LABELS))
    return network, hf.DetrImageProcessor(size=_SHORT)


def _eomt(**processor: Any) -> Made:
    network = hf.EomtForUniversalSegmentation(hf.EomtConfig(**_EOMT, **LABELS))
    return network, hf.EomtImageProcessor(**processor)


def _eomt_dinov3() -> Made:
    network = hf.EomtDinov3ForUniversalSegmentation(hf.EomtDinov3Config(**_EOMT, **LABELS))
    return network, hf.EomtImageProcessor(**_PADDED)


def _rf_detr() -> Made:
    backbone = {**_VIT, "model_type": "rf_detr_dinov2", "num_hidden_layers": 4, "num_windows": 2}
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 16, "num_queries": 12, "group_detr": 1}
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
    backbone["out_features"] = ["stage2", "stage4"]
    config = hf.RfDetrConfig(backbone_config=backbone, **sizes, **heads, **LABELS)
    return hf.RfDetrForInstanceSegmentation(config), hf.RfDetrImageProcessor(size=_SQUARE)


_PADDED: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True}
_PIECES: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": None}, "do_split_image": True}

_CLASS_HEADS = ("class_predictor", "class_labels_classifier", "decoder.class_embed", "model.class_embed")
"""Ends of the names of the layers that tell the classes of queries."""

_GAINS = {
    "detr": {"query_position_embeddings": 8.0, "bbox_attention": 3.0, "fpn_adapter": 0.1},
    "oneformer": {"queries_embedder": 8.0},
}
"""What makes the masks of random queries differ, by a part of the tensor's name."""

MADE: Mapping[str, Callable[[], Made]] = {
    "segformer": _segformer,
    "upernet-convnext": lambda: _upernet(hf.ConvNextConfig(out_features=_STAGES, **_WIDTHS), 16),
    "upernet-swin": lambda: _upernet(hf.SwinConfig(**_SWIN), 64),
    "dpt": _dpt,
    "beit": _beit,
    "data2vec": _data2vec,
    "mobilevit": _mobilevit,
    "mobilevitv2": _mobilevitv2,
    "mobilenet_v2": _mobilenet,
    "sapiens2": _sapiens,
    "tipsv2_dpt": _tips,
    "mask2former": _mask2former,
    "maskformer": _maskformer,
    "detr": _detr,
    "eomt": lambda: _eomt(**_PADDED),
    "eomt-pieces": lambda: _eomt(**_PIECES),
    "eomt_dinov3": _eomt_dinov3,
    "rf_detr": _rf_detr,
}
"""What can be written; ``oneformer`` too."""


def _oneformer(folder: Path) -> Made:
    """OneFormer with the files that its processor needs: a class file, and a tokenizer of single letters."""
    network = hf.OneFormerForUniversalSegmentation(
        hf.OneFormerConfig(backbone_config=hf.SwinConfig(**_SWIN), **_ONEFORMER, **LABELS)
    )
    classes = {str(i): {"name": n, "isthing": n in THINGS} for i, n in enumerate(NAMES)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(classes))
    images = hf.OneFormerImageProcessor(size=_SHORT, repo_path=str(folder), class_info_file="classes.json", num_text=4)
    letters = sorted(set("the task is semantic panoptic instance") - {" "})
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = hf.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    return network, hf.OneFormerProcessor(images, tokenizer, max_seq_length=20, task_seq_length=20)


def photo(height: int = 61, width: int = 83) -> NDArray[np.uint8]:
    """(height, width, 3): colours that run, noise, two flat shapes."""
    y, x = np.mgrid[:height, :width]
    running = np.stack([255 * x / width, 255 * y / height, 3 * x + 2 * y], -1) % 256
    noisy = (running + np.random.default_rng(0).normal(0, 15, (height, width, 3))).clip(0, 255).astype(np.uint8)
    noisy[height // 6 : height // 2, width // 4 : width // 2] = (200, 30, 90)
    noisy[(y - height * 0.7) ** 2 + (x - width * 0.7) ** 2 < (height * 0.2) ** 2] = (20, 220, 40)
    return noisy


def write(name: str, folder: Path, **saving: Any) -> Path:
    """Write a network whose random weights tell places and classes apart."""
    torch.manual_seed(0)
    network, processor = _oneformer(folder) if name == "oneformer" else MADE[name]()
    for key, value in network.named_parameters():
        if value.dim() > 1:
            gain = next((g for part, g in _GAINS.get(name, {}).items() if part in key), 1.0)
            value.data.normal_(0, gain * (2 / value[0].numel()) ** 0.5)
    if name == "detr":  # attention maps are all that tells its queries' masks apart
        network.mask_head.conv1.conv.weight.data[:, _DETR["d_model"] :] *= 300
    _spread_classes(network.eval(), processor, {"task_inputs": ["panoptic"]} if name == "oneformer" else {})
    network.save_pretrained(folder, **saving)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread_classes(network: Any, processor: Any, extra: dict[str, Any]) -> None:
    """Make the queries of one photo choose different classes: each class's scores get mean 0 and deviation 2."""
    heads = [m for k, m in network.named_modules() if k.endswith(_CLASS_HEADS)]
    inputs = processor(images=[photo()], return_tensors="pt", **extra) if heads else {}
    for head in heads:

        def spread(layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            flat = output.flatten(0, -2)
            scale = 2 / flat.std(0).clamp(min=1e-6)
            layer.bias.data = (layer.bias - flat.mean(0)) * scale
            layer.weight.data *= scale[:, None]
            return (output - flat.mean(0)) * scale

        hook = head.register_forward_hook(spread)
        network(**{k: v for k, v in inputs.items() if k in ("pixel_values", "pixel_mask", "task_inputs")})
        hook.remove()


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change top-level keys of a JSON file; None takes one out."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content = {k: v for k, v in {**content, **changes}.items() if v is not None}
    (folder / file).write_text(json.dumps(content))
