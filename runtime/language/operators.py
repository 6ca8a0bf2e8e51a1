"""The closed list of torch operators that an artifact's code may call.

torch has thousands of operators in its `aten` namespace. Some read or write files, some trust the sizes and indices
they get and access memory outside their tensors, some print, and many exist only for training. Listed here are
those that make a new tensor, or change one in place, from tensors and numbers, and that check their arguments. The
compiler already rejects a model that needs any other operator.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import ArtifactError

# The overloads that `require_operators` accepts with each of the torch releases named in the first line.
LISTED_PATH = Path(__file__).with_name("operators.txt")

_POINTWISE = """
    abs acos acosh add addcdiv addcmul arccos arcsin arctan asin asinh atan atan2 atanh bitwise_and bitwise_left_shift
    bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad
    div divide elu eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac gelu ge greater
    greater_equal gt hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu lerp less
    less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit
    lt masked_fill max maximum min minimum mish mul multiply nan_to_num ne neg negative not_equal pow prelu rad2deg
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt
    square sub subtract tan tanh threshold tril triu true_divide trunc where xlogy
"""
_SHAPE = """
    adjoint alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat chunk clone
    column_stack concat concatenate constant_pad_nd contiguous detach diag diag_embed diagonal dstack expand expand_as
    flatten flip fliplr flipud hstack hsplit lift_fresh lift_fresh_copy mT meshgrid moveaxis movedim narrow numpy_T pad
    permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 select slice
    split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile to transpose type_as unbind unflatten
    unfold unsafe_chunk unsafe_split unsqueeze view view_as view_as_complex view_as_real vsplit vstack _to_copy
    _unsafe_view reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d im2col col2im complex real imag conj resolve_conj resolve_neg T mH H copy block_diag
"""
_INDEX = """
    argsort bincount bucketize count_nonzero embedding gather index index_add index_copy index_fill index_put
    index_select masked_scatter masked_select nonzero nonzero_numpy one_hot scatter scatter_add scatter_reduce
    searchsorted select_scatter slice_scatter diagonal_scatter sort take_along_dim topk unique_consecutive unique_dim
    _unique2 kthvalue msort isin
"""
_REDUCE = """
    all allclose amax amin aminmax any argmax argmin cummax cummin cumprod cumsum diff dist equal linalg_norm
    linalg_vector_norm logcumsumexp logsumexp log_softmax mean median nanmean nansum norm prod softmax std std_mean sum
    var var_mean _softmax _log_softmax cov _is_all_true _is_any_true
"""
_PRODUCT = """
    addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot einsum inner kron linalg_inv
    linalg_matrix_exp linalg_solve linear matmul mm mv outer scaled_dot_product_attention tensordot trace vdot
    linalg_cross linalg_multi_dot linalg_solve_triangular _convolution
"""
_LAYER = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout
    avg_pool1d avg_pool2d avg_pool3d batch_norm dropout feature_dropout glu grid_sampler grid_sampler_2d
    grid_sampler_3d group_norm instance_norm layer_norm max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    native_dropout native_group_norm native_layer_norm normalize rms_norm upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    affine_grid_generator
    channel_shuffle
"""
_MAKE = """
    arange bartlett_window blackman_window empty empty_like eye full full_like hamming_window hann_window linspace
    logspace new_empty new_full new_ones new_zeros ones ones_like rand rand_like randint randint_like randn randn_like
    randperm scalar_tensor tril_indices triu_indices zeros zeros_like cartesian_prod combinations vander bernoulli
    multinomial normal uniform
"""
_SPECTRUM = """
    fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn istft stft polar angle
"""
_NUMBER = """
    dim is_complex is_floating_point is_nonzero is_same_size item numel result_type size stride sym_numel sym_size
    sym_storage_offset sym_stride _local_scalar_dense can_cast
"""
_PYTHON = """
    __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__
"""
# In-place operators other than the pointwise ones, whose in-place variants `ALLOWED` adds by appending an underscore.
_IN_PLACE = """
    copy_ cumprod_ cumsum_ detach_ fill_ fill_diagonal_ normal_ uniform_ bernoulli_ random_ exponential_ squeeze_ t_
    transpose_ unsqueeze_ zero_ dropout_ baddbmm_ addmm_ addbmm_ addmv_ addr_ index_put_ index_add_ index_copy_
    index_fill_ masked_scatter_ scatter_ scatter_add_ scatter_reduce_ swapaxes_ swapdims_
"""

POINTWISE, SHAPE = frozenset(_POINTWISE.split()), frozenset(_SHAPE.split())
ALLOWED: frozenset[str] = frozenset(
    (
        *_POINTWISE.split(),
        *(f"{name}_" for name in _POINTWISE.split()),
        *_SHAPE.split(),
        *_INDEX.split(),
        *_REDUCE.split(),
        *_PRODUCT.split(),
        *_LAYER.split(),
        *_MAKE.split(),
        *_SPECTRUM.split(),
        *_NUMBER.split(),
        *_PYTHON.split(),
        *_IN_PLACE.split(),
    )
)


# Parts of overload names: such overloads write into a tensor argument.
_WRITES = frozenset(("out", "values", "max", "min", "OutTensor", "OutScalar"))
# Operators whose result always shares the memory of their argument.
_VIEW_NAMES = """
    adjoint alias as_strided chunk detach diagonal expand expand_as mT numpy_T H T narrow permute select slice split
    split_with_sizes squeeze swapaxes swapdims t transpose unbind unfold unsqueeze view view_as view_as_real
    view_as_complex real imag movedim moveaxis tensor_split
"""
_VIEWS = frozenset(_VIEW_NAMES.split())


def is_allowed(name: str, overload: str) -> bool:
    """Whether code may call `torch.ops.aten.<name>.<overload>`; overloads with an output argument are unsupported."""
    return name in ALLOWED and not _WRITES & set(overload.split("_"))


def changes_in_place(name: str) -> bool:
    """Whether the operator changes its first argument."""
    return name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))


def is_view(name: str) -> bool:
    """Whether the operator's result shares the memory of its first argument."""
    return name in _VIEWS or changes_in_place(name)


@functools.cache
def listed() -> tuple[frozenset[str], frozenset[str]]:
    """Return the releases of torch for which the list of overloads is valid, such as `2.13`, and the overloads."""
    releases, *lines = LISTED_PATH.read_text(encoding="ascii").splitlines()
    rows = (line.split() for line in lines)
    return frozenset(releases.split()[2:]), frozenset(f"{name}.{overload}" for name, *own in rows for overload in own)


def check_operators(operators: Mapping[str, str]) -> None:
    """Check operators as `require_operators` does, but import torch only for operators or releases that are not listed.

    Raises:
        ArtifactError: naming the file and the operator.
    """
    releases, known = listed()
    if _installed_release() not in releases:
        known = frozenset()
    unlisted = {operator: file for operator, file in operators.items() if operator not in known}
    if unlisted:
        require_operators(unlisted)


def _installed_release() -> str:
    try:
        return ".".join(importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ""


def require_operators(operators: Mapping[str, str]) -> None:
    """Require that the installed torch has these operators, and that none changes an argument unless its name says so.

    Args:
        operators: `operator.overload` to the file that calls it.

    Raises:
        ArtifactError: naming the file and the operator.
    """
    import torch

    for operator, file in operators.items():
        name, _, overload = operator.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        overloads: list[str] = []
        if isinstance(packet, torch._ops.OpOverloadPacket):
            overloads = packet.overloads()  # type: ignore[no-untyped-call]
        if overload not in overloads:
            raise ArtifactError(
                f"{file} calls torch.ops.aten.{operator}, which torch {torch.__version__} does not have",
                hint="install the torch version that the artifact was compiled with",
            )
        schema = getattr(packet, overload)._schema
        writes = any(entry.alias_info is not None and entry.alias_info.is_write for entry in schema.arguments)
        if "Tensor" not in str(schema) or (writes and not changes_in_place(name)):
            raise ArtifactError(f"{file} calls torch.ops.aten.{operator}, which is not allowed in an artifact's code")
