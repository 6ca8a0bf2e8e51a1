"""What default configs of models that see leave unsaid or state inconsistently, and sizes that keep them quick.

Model type (or the name of one case) to entries, as in `tests.zoo_exceptions`.
"""

from __future__ import annotations

from typing import Any

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR = {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None}
_TILES = {"vision_config.image_size": 56, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
_SECTIONS: dict[str, Any] = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
_IMAGE_TOKEN = 383
_TURNING = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_OCR: dict[str, Any] = {
    "vision_config.sam_config.image_size": 256,
    "vision_config.sam_config.downsample_channels": [32, 64],
    "vision_config.sam_config.mlp_dim": 96,
}
_GRANITE = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
_VISUAL = 64  # entries of a codebook
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
_QFORMER = {
    "model_type": "blip_2_qformer",
    "hidden_size": 64,
    "encoder_hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 96,
}
_VISION_GEMMA4 = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "position_embedding_size": 64,
}

VISION: dict[str, dict[str, Any]] = {
    # The image does not divide as the model needs it.
    "aria": {"projector_patch_to_query_dict": {"49": 16}},
    "aya_vision": {"vision_config.image_size": 56},
    "idefics3": {"vision_config.image_size": 128},
    "smolvlm": {"vision_config.image_size": 128},
    "masked LM/modernvbert": {"vision_config.image_size": 128},
    "masked LM/ultravbert": {"vision_config.image_size": 128},
    "causal LM/gemma3": {"mm_tokens_per_image": 49},
    "t5gemma2": {"encoder.mm_tokens_per_image": 49},
    # Entries that every checkpoint has, and the default has not.
    "blip-2": {"image_token_index": _IMAGE_TOKEN},
    "instructblip": {"image_token_index": _IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": _IMAGE_TOKEN},
    "minicpm_ocr": {"image_token_id": _IMAGE_TOKEN, "video_token_id": 382},
    "minicpmv4_6": {"image_token_id": _IMAGE_TOKEN, "video_token_id": 382},
    "minicpmv4_7": {"image_token_id": _IMAGE_TOKEN, "video_token_id": 382},
    "nemotron_h_omni": {
        "image_token_id": _IMAGE_TOKEN,
        "video_token_id": 382,
        "audio_token_id": 381,
        "text_config.n_groups": 2,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 370, "vision_end_token_id": 371, "audio_start_token_id": 372},
    "step3p7": {"text_config.sliding_window": 16, "vision_config.image_size": 112},
    "chameleon": {
        "vq_config.num_embeddings": _VISUAL,
        "vq_config.resolution": 128,
        "image_token_id": _IMAGE_TOKEN,
        "vocabulary_map": {"<image>": _IMAGE_TOKEN}
        | {"IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z": 200 + code for code in range(_VISUAL)},
    },
    "emu3": {
        "vq_config.codebook_size": _VISUAL,
        "image_token_id": _IMAGE_TOKEN,
        "vocabulary_map": {"<image>": _IMAGE_TOKEN, "<|extra_200|>": 382}
        | {f"<|visual token {code:06d}|>": 200 + code for code in range(_VISUAL)},
    },
    "causal LM/gemma4": {"vision_config": _VISION_GEMMA4},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
        "vision_config": _VISION_GEMMA4,
    },
    "causal LM/gemma4_unified": {
        "vision_config": {"model_type": "gemma4_unified_vision", "mm_embed_dim": 64, "output_proj_dims": 64},
    },
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _TURNING, "sliding_attention": _TURNING}},
    "deepseek_ocr2": _OCR
    | {
        "text_config.num_experts_per_tok": 2,
        "text_config.mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "unlimited_ocr": _OCR | {"vision_config.encoder_config.image_size": 28},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 16,
        "text_config.indexer_compress_ratio": 4,
    },
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [0, 1, 1, 1],
        "qformer_config": _QFORMER,
        "vision_config": _SIGLIP,
        "vision_feature_select_strategy": "full",
        **{f"text_config.{name}": 1.0 for name in _GRANITE},
        "image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]],
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "glm_ocr": _SECTIONS,
    "kosmos-2.5": {"latent_query_num": 64},
    "glm5_next": {"text_config.index_topk": 16},
    "paddleocr_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen2_5_omni_thinker": _SECTIONS
    | {"vision_start_token_id": 370, "vision_end_token_id": 371, "audio_start_token_id": 372},
    # Detection transformers with a backbone that is here.
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "deformable_detr": _DETR,
    "detr": _DETR,
    "table-transformer": _DETR,
    # Small, so that they are quick.
    "deepseek_vl_hybrid": {"high_res_vision_config.image_size": 128, "vision_config.image_size": 64},
    "depth_pro": {
        "intermediate_hook_ids": [2, 0],
        "patch_size": 32,
        "image_model_config.image_size": 32,
        "image_model_config.patch_size": 8,
        "patch_model_config.image_size": 32,
        "patch_model_config.patch_size": 8,
        "fov_model_config.image_size": 32,
        "fov_model_config.patch_size": 8,
    },
    "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "florence2": {
        "vision_config.embed_dim": [16, 32, 48, 64],
        "vision_config.num_heads": [2, 2, 4, 4],
        "vision_config.num_groups": [2, 2, 4, 4],
        "vision_config.depths": [1, 1, 2, 1],
    },
    "janus": {"vq_config.base_channels": 32, "vision_config.image_size": 96},
    "llava": {"vision_config.image_size": 56},
    "vipllava": {"vision_config.image_size": 56},
    "kosmos-2": {"vision_config.image_size": 56, "latent_query_num": 16},
    "videomae": {"image_size": 64, "num_frames": 4},
    "videoprism_vision_model": {"image_size": 72, "num_frames": 4},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mllama": {"vision_config.image_size": 56},
    "image encoder/mllama": {"image_size": 56},
    "inkling_mm_model": {"vision_config.patch_size": 8},
    "muse_spark": {"audio_config.hidden_sizes": [32, 32, 32]},
    "causal LM/got_ocr2": {"vision_config.image_size": 256},
    "vivit": {"num_frames": 4, "image_size": 64},
    "yolos": {"image_size": [64, 96]},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "dinov3_convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "resnet": {"hidden_sizes": [32, 64, 96, 128]},
    "bit": {"hidden_sizes": [128, 128, 256, 256], "depths": [1, 1, 1, 1]},
}

# What its own library cannot run: class and the version of transformers to the reason.
BROKEN = {
    ("Llama4ForConditionalGeneration", "5.24.0"): "forward reads image_outputs, which the text's output has not",
}
