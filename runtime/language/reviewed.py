"""Reviewed lists of library names that are harmless with any arguments; `runtime.language.reach` decides by them.

Harmless code only calculates: it opens no file or connection, imports nothing, starts nothing, and calls nothing by a
name that comes from its arguments.
"""

from __future__ import annotations

import functools
import re

from runtime.language.operators import is_allowed

# The library's modeling code; a function of these modules is judged by its references.
_COMPUTING = re.compile(
    r"transformers\.(models\.(?!auto\.)[a-z0-9_]+\.(modeling_[a-z0-9_]+|vision|perceiver)|masking_utils|modeling_attn_mask_utils"
    r"|modeling_rope_utils|modeling_layers|modeling_outputs|pytorch_utils|activations|cache_utils|vision_utils"
    r"|time_series_utils|integrations\.(sdpa_attention|moe))\Z"
)
# Names outside of those modules that such a function may refer to: decorators that read flags such as `return_dict` and
# collect outputs; tables of activations, attentions and rotary embeddings by their names in the config; version
# checks; the log.
_KNOWN_BY_MODULE = {
    "transformers.activations": "ACT2FN ACT2CLS",
    "transformers.backbone_utils": "BackboneMixin.out_features BackboneMixin.out_indices filter_output_hidden_states",
    "transformers.generation.continuous_batching.cache": "PagedAttentionCache",
    "transformers.image_processing_utils": "select_best_resolution",
    "transformers.image_transforms": "center_to_corners_format corners_to_center_format",
    "transformers.integrations.accelerate": "force_accelerate_hooks",
    "transformers.integrations.deepspeed": "is_deepspeed_zero3_enabled",
    "transformers.integrations.hub_kernels": (
        "use_kernel_forward_from_hub use_kernel_func_from_hub use_kernel_func_from_hub_with_fallback "
        "use_kernelized_func"
    ),
    "transformers.masking_utils": "ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "transformers.modeling_rope_utils": "ROPE_INIT_FUNCTIONS dynamic_rope_update",
    "transformers.modeling_utils": (
        "ALL_ATTENTION_FUNCTIONS EmbeddingAccessMixin.get_input_embeddings ModuleUtilsMixin.device "
        "ModuleUtilsMixin.dtype PreTrainedModel.loss_function "
        "PreTrainedModel.warn_if_padding_and_no_attention_mask slice_logits_to_keep"
    ),
    "transformers.pytorch_utils": "compile_compatible_method_lru_cache",
    "transformers.utils.auto_docstring": "auto_docstring",
    "transformers.utils.deprecation": "deprecate_kwarg",
    "transformers.utils.doc": "add_start_docstrings_to_model_forward replace_return_docstrings",
    "transformers.utils.generic": (
        "ModelOutput accepts_precomputed_kwargs can_return_tuple check_model_inputs get_max_seqlen "
        "is_flash_attention_requested maybe_autocast merge_with_config_defaults torch_float torch_int"
    ),
    "transformers.utils.import_utils": (
        "is_torch_greater_or_equal is_torchdynamo_compiling is_torchdynamo_exporting is_tracing torch_compilable_check"
    ),
    "transformers.utils.logging": "get_logger",
    "transformers.utils.output_capturing": "capture_outputs select_hidden_states",
}
_KNOWN = frozenset(f"{module}:{name}" for module, names in _KNOWN_BY_MODULE.items() for name in names.split())
_BUILTIN_NAMES = """
    abs all any bool bytes callable dict divmod enumerate filter float frozenset hasattr hash id int isinstance
    issubclass iter len list map max min next object pow print property range repr reversed round set slice sorted
    staticmethod str sum super tuple type zip NotImplemented Ellipsis __name__
"""
BUILTINS = frozenset(_BUILTIN_NAMES.split())
DUNDERS = frozenset(
    [
        "__class__",
        "__name__",
        "__init__",
        "__call__",
        "__len__",
        "__getitem__",
        "__setitem__",
        "__iter__",
        "__contains__",
    ]
)
# Attributes by which a module selects the implementation that it calls; no step may set them.
SETTLED = re.compile(r"config|_attn_implementation\w*|_experts_implementation\w*|_use_kernels|use_kernels|__.*")
# Methods of tensors, modules, caches and loggers, besides those that are operators' names. `create_causal_mask` calls
# get_query_offset and get_mask_sizes of a cache (in transformers 5.17 of one whose class `Reach` cannot tell). In
# transformers.cache_utils they only compute numbers from the cache's lengths, and `Reach` still follows those that a
# model's own classes define.
_METHOD_NAMES = """
    apply bool byte char children cpu cuda debug double dtype element_size eval fill_ float get_interface
    get_mask_sizes get_query_offset get_seq_length get_text_config half indices info int is_contiguous item long
    mode named_children named_parameters new new_tensor numpy parameters requires_grad_ short size storage_offset
    stride tolist train type unique warn warning warning_once
"""
_METHODS = frozenset(_METHOD_NAMES.split())
_NAMES_ELSEWHERE = re.compile(
    r"torch\.(nn\.(functional|init|utils\.rnn)|fft|linalg|special)\.[a-z0-9_]+|torch\.nn\.[A-Z][A-Za-z0-9]*"
    r"|math\.[a-z0-9_]+|itertools\.[a-z_]+|operator\.[a-z_]+|collections\.(abc\.)?[A-Za-z_]+|typing\.[A-Z][A-Za-z]+"
    r"|dataclasses\.[a-z]+|enum\.[A-Za-z]+|abc\.[A-Za-z]+|fractions\.Fraction"
    r"|functools\.(partial|reduce|lru_cache|cache|cached_property|wraps)"
    r"|copy\.(copy|deepcopy)|warnings\.warn|contextlib\.(nullcontext|contextmanager)|inspect\.signature|sys\.maxsize"
    r"|numpy\.(u?int(8|16|32|64)|float(16|32|64)|ndarray|prod)|torch\.autograd\.Function|torch\.(cuda\.)?Stream"
    r"|torch\.nn\.attention\.(flex_attention\.BlockMask|sdpa_kernel|SDPBackend\.MATH)|torch\.jit\.(is_tracing|ignore)"
    r"|torch\._dynamo\.mark_static_address"
)
_TORCH_NAMES = """
    Size Tensor as_tensor argwhere autocast bfloat16 bool channels_last channels_last_3d complex64 complex128
    contiguous_format device dtype double e enable_grad finfo float float16 float32 float64 get_autocast_dtype
    get_default_dtype half histc iinfo inf inference_mode int int16 int32 int64 int8 is_autocast_enabled is_tensor
    legacy_contiguous_format long nan no_grad pi preserve_format set_grad_enabled strided tensor uint8 unique
    is_grad_enabled
"""
_TORCH = frozenset(_TORCH_NAMES.split())


def is_computing(module: str) -> bool:
    """Whether a module is part of the library's modeling code, whose functions are judged by their references."""
    return _COMPUTING.match(module) is not None


def is_known(path: str) -> bool:
    """Whether a function, class or value of the library is known to be harmless."""
    return path in _KNOWN


def is_known_elsewhere(name: str) -> bool:
    """Whether a function, class or value of another library is known to be harmless."""
    if _NAMES_ELSEWHERE.fullmatch(name) is not None:
        return True
    top, _, own = name.partition(".")
    return top == "torch" and (own == "" or own in _TORCH or is_allowed(own, "default"))


def is_free(name: str) -> bool:
    """Whether a method of this name is harmless on every tensor, container, cache and logger."""
    return name in _METHODS or name in _container_methods() or is_allowed(name, "default")


@functools.cache
def _container_methods() -> frozenset[str]:
    kinds = (str, list, dict, tuple, set)
    return frozenset(name for kind in kinds for name in dir(kind) if not name.startswith("_"))


@functools.cache
def is_method_elsewhere(name: str) -> bool:
    """Whether torch's tensors or modules have a method of this name."""
    import torch
    from torch import nn

    return any(callable(getattr(kind, name, None)) for kind in (torch.Tensor, nn.Module))
