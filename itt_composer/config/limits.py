"""What a training config's values may be where the signature of what they build does not say it.

Keys are the last two parts of a dotted key, or the last one for any section.
"""

from __future__ import annotations

from typing import Any

from itt_composer.checks import TIME_UNITS

COUNT = {'minimum': 1}
FRACTION = {'minimum': 0, 'maximum': 1}
BACKENDS = ('inductor', 'eager', 'aot_eager', 'cudagraphs')
"""Of ``torch.compile``."""

LIMITS: dict[str, dict[str, Any]] = {
    'max_seq_len': COUNT,
    'icl_seq_len': COUNT,
    'global_train_batch_size': COUNT,
    'device_eval_batch_size': COUNT,
    'icl_subset_num_batches': COUNT,
    'device_train_microbatch_size': COUNT,
    'seed': {'minimum': 0, 'below': 2**32},
    'dist_timeout': {'above': 0},
    'max_split_size_mb': COUNT,
    'precision': {'choices': ('fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8')},
    'hf_checkpointer.precision': {'choices': ('float32', 'float16', 'bfloat16')},
    'python_log_level': {'choices': ('debug', 'info', 'warning', 'error', 'critical')},
    'optimizer.lr': {'minimum': 0, 'maximum': 100},
    'optimizer.betas': {'minimum': 0, 'below': 1},
    'optimizer.eps': {'above': 0, 'maximum': 1},
    'optimizer.weight_decay': {'minimum': 0, 'maximum': 1},
    # Factors of optimizer.lr.
    'scheduler.alpha': FRACTION,
    'scheduler.alpha_i': FRACTION,
    'scheduler.alpha_f': FRACTION,
    'scheduler.alpha_f_decay': FRACTION,
    'scheduler.alpha_f_cooldown': FRACTION,
    'gradient_clipping.clipping_threshold': {'above': 0},
    'gradient_clipping.clipping_type': {'choices': ('adaptive', 'norm', 'value')},
    'model.init_device': {'choices': ('cpu', 'meta', 'mixed')},
    'num_workers': {'minimum': 0},
    'prefetch_factor': COUNT,
    'timeout': {'minimum': 0},
    'num_canonical_nodes': COUNT,
    'shuffle_seed': {'minimum': 0, 'below': 2**32},
    'shuffle_block_size': COUNT,
    'sampling_granularity': COUNT,
    'predownload': {'minimum': 0},
    'download_retry': {'minimum': 0},
    'download_timeout': {'above': 0},
    'epoch_size': {'minimum': 1, 'units': ('k', 'm', 'b', 't')},
    'cache_limit': {'minimum': 1, 'units': ('b', 'kb', 'mb', 'gb', 'tb', 'pb')},
    'proportion': {'minimum': 0},
    'shuffle_algo': {'choices': ('naive', 'py1b', 'py1br', 'py1e', 'py1s', 'py2s')},
    'batching_method': {'choices': ('random', 'stratified', 'per_stream', 'device_per_stream')},
    'sampling_method': {'choices': ('balanced', 'fixed')},
    'partition_algo': {'choices': ('orig', 'relaxed')},
    'interval': COUNT,
    'flush_interval': COUNT,
    'batch_log_interval': COUNT,
    'dist_aggregate_batch_interval': COUNT,
    'window_size': COUNT,
    'skip_batches': {'minimum': 0},
    'model_max_length': COUNT,
    'compile_config.backend': {'choices': BACKENDS},
    'compile_config.mode': {'choices': ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')},
    'fsdp_config.sharding_strategy': {
        'choices': ('FULL_SHARD', 'SHARD_GRAD_OP', 'NO_SHARD', 'HYBRID_SHARD', '_HYBRID_SHARD_ZERO2')
    },
    'fsdp_config.state_dict_type': {'choices': ('full', 'sharded')},
    'fsdp_config.backward_prefetch': {'choices': ('BACKWARD_PRE', 'BACKWARD_POST', 'NONE')},
}
COUNT_OR_ALL = ('save_num_checkpoints_to_keep', 'eval_subset_num_batches', 'train_subset_num_batches')
"""A whole number of at least 1, or -1 for all of them."""

TIMES = ('max_duration', 'eval_interval', 'save_interval', 'console_log_interval')
"""Top-level keys that hold a time; a bare number is one of epochs."""
TRAINER_UNITS = (*TIME_UNITS, 'iter', 'sec')
MAY_BE_NULL = ('prefetch_factor',)
"""What PyTorch takes null for, and the annotation does not say."""
MAY_BE_ZERO = ('t_warmup', 't_cooldown')

OF_FOUNDRY = (
    *('device_train_batch_size', 'n_gpus', 'device_train_grad_accum'),
    *('eval_loaders', 'icl_tasks_str', 'eval_gauntlet_str'),
)
"""Top-level keys that foundry fills in itself."""

OF_TRAIN_SCRIPT = {'resume_with_changes': 'bool'}
"""Top-level keys that are ours: a run may be resumed under another config, on purpose (``training/resume.py``)."""

# Of AutoTokenizer.from_pretrained and PreTrainedTokenizerFast, which take any others too, without effect.
TOKENIZER_KWARGS = {
    'model_max_length': 'int',
    **dict.fromkeys(
        ('add_bos_token', 'add_eos_token', 'add_prefix_space', 'clean_up_tokenization_spaces', 'force_download',
         'legacy', 'local_files_only', 'split_special_tokens', 'trust_remote_code', 'use_fast'), 'bool',
    ),
    **dict.fromkeys(
        ('bos_token', 'cls_token', 'eos_token', 'mask_token', 'pad_token', 'sep_token', 'unk_token', 'chat_template',
         'padding_side', 'truncation_side', 'cache_dir', 'revision', 'subfolder', 'tokenizer_type'), 'str | None',
    ),
    'token': 'str | bool | None',
    'additional_special_tokens': 'list[str] | None',
    'model_input_names': 'list[str] | None',
}  # fmt: skip
