"""Operators that compute nothing: 0 FLOPs by statement, so that they are known rather than unknown.

``FREE`` touch no element either: they allocate, answer about sizes, or are views made in place. The others move bytes
(views do not: ``Call``).
"""

from __future__ import annotations

_FREE = """
    empty empty_like empty_strided new_empty new_empty_strided empty_permuted resize resize_as set set_data
    _resize_output record_stream size stride numel dim storage_offset is_contiguous sym_size
    sym_stride sym_numel sym_storage_offset sym_is_contiguous is_same_size _has_same_storage_numel is_pinned
    _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async
    sym_constrain_range sym_constrain_range_for_size _cudnn_init_dropout_state _nested_tensor_size
    as_strided squeeze unsqueeze t transpose detach swapaxes swapdims
    _use_cudnn_ctc_loss _version _cufft_get_plan_cache_size
"""

_MOVED = """
    clone copy _to_copy _copy_from contiguous to cat stack hstack vstack repeat repeat_interleave tile
    index index_select _unsafe_index gather take take_along_dim masked_select nonzero nonzero_static argwhere
    scatter index_copy index_fill masked_fill masked_scatter where roll flip rot90 put fill zero zeros ones full
    zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor arange range linspace logspace eye
    tril triu tril_indices triu_indices diag_embed slice_scatter select_scatter diagonal_scatter as_strided_scatter
    slice_backward select_backward diagonal_backward unfold_backward value_selecting_reduction_backward
    embedding sort argsort topk kthvalue mode msort _unique2 unique_dim unique_consecutive bincount histc
    searchsorted bucketize one_hot isin complex real imag view_as_real_copy
    rand rand_like randn randn_like randint randint_like randperm normal normal_functional uniform bernoulli
    random exponential cauchy geometric log_normal multinomial poisson binomial _standard_gamma _sample_dirichlet
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d im2col max_unpool2d max_unpool3d
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle split_copy split_with_sizes_copy
    unfold_copy permute_copy transpose_copy view_copy expand_copy as_strided_copy t_copy slice_copy select_copy
    squeeze_copy unsqueeze_copy cartesian_prod block_diag _chunk_cat
    _pack_padded_sequence _pack_padded_sequence_backward _pad_packed_sequence _cudnn_rnn_flatten_weight
    mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight to_mkldnn _to_dense to_dense _to_sparse
    _coalesce _indices _values _nnz indices values coalesce _coalesced is_coalesced sparse_mask
    _sparse_coo_tensor_with_dims_and_tensors _nested_tensor_from_mask _nested_from_padded to_padded_tensor
    _nested_tensor_from_tensor_list _local_scalar_dense item is_nonzero equal is_set_to
    bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift
    __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__
    signbit gcd lcm _convert_weight_to_int4pack _convert_weight_to_int4pack_for_cpu
    _nested_select_backward _linalg_check_errors _validate_compressed_sparse_indices
"""

FREE = frozenset(_FREE.split())
MOVED = frozenset(_MOVED.split())
