"""The README of an exported model: what it is, how it was trained, what it scored, how to load it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from itt_composer.analysis.tensorboard import RunLogs
from itt_composer.export.checkpoint import Checkpoint
from itt_composer.flops import Decoder, exact_flops, paper_flops, parameters

FAMILIES = {
    'none': 'dense baseline',
    'loop': 'Loop',
    'itt': 'Inner Thinking Transformer',
    'residual_scale': 'residual scale (a control)',
}
PAPER = 'https://arxiv.org/abs/2502.13842'


@dataclass
class RunFigures:
    """Figures of the run that trained a model; empty where they are not known."""

    run_name: str | None = None
    progress: dict[str, float] = field(default_factory=dict)
    """``batch``, ``sample``, ``token`` and ``hours`` trained."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Cross-entropy in nats per token of each evaluation set, as last measured before the checkpoint."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensorboard: Path | None = None) -> RunFigures:
        """Read the figures in a checkpoint and in its run's TensorBoard folder, ``<runs>/tensorboard/<run name>``.

        Raises:
            ValueError: the TensorBoard folder that was named is missing.
        """
        if tensorboard is not None and not tensorboard.is_dir():
            raise ValueError(f'{tensorboard}: no such TensorBoard folder')
        if tensorboard is None and checkpoint.run_name is not None:
            # <runs>/<run name>/checkpoints/<checkpoint>
            tensorboard = checkpoint.path.parent.parent.parent / 'tensorboard' / checkpoint.run_name
        batch = checkpoint.progress.get('batch', math.inf)
        evaluation = {} if tensorboard is None or not tensorboard.is_dir() else _evaluation(tensorboard, batch)
        return cls(checkpoint.run_name, checkpoint.progress, evaluation)


def _evaluation(tensorboard: Path, batch: float) -> dict[str, float]:
    """Return each evaluation set's last loss up to ``batch``."""
    curves = RunLogs(tensorboard).domain_losses()
    known = {name: [curve[step] for step in sorted(curve) if step <= batch] for name, curve in curves.items()}
    return {name: losses[-1] for name, losses in known.items() if losses}


def model_card(config: PretrainedConfig, figures: RunFigures) -> str:
    """Return the card, Markdown with the hub's header.

    Args:
        config: an ``ITTConfig``, as the model trained with it.
        figures: of its run.
    """
    family = FAMILIES[config.thinking]
    parts = [
        '---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- inner-thinking-transformer\n---',
        f'# {figures.run_name or family}',
        f'A language model of the {family} family, trained with itt_composer, an implementation of '
        f'[Inner Thinking Transformer]({PAPER}).',
        *_origin(config),
        _table(_shape(config)),
        *_training(figures),
        *_routing(config),
        _usage(config),
    ]
    return '\n\n'.join(parts) + '\n'


def _origin(config: PretrainedConfig) -> list[str]:
    """What the model was made from, where it did not start from fresh weights."""
    origin = getattr(config, 'pretrained_from', None)
    if not origin:
        return []
    # Of a folder on the machine that trained it, only the name says something here.
    name = Path(origin).name if Path(origin).is_absolute() else origin
    return [f'Made from the pretrained model `{name}`, whose weights it started from.']


def _shape(config: PretrainedConfig) -> dict[str, str]:
    decoder = Decoder.from_model_config(config.to_dict())
    S = config.max_position_embeddings
    rows = {
        'parameters': f'{parameters(decoder).total:,}',
        'hidden size, intermediate size': f'{config.hidden_size}, {config.intermediate_size}',
        'layers': str(config.num_hidden_layers),
        'attention heads, key-value heads': f'{config.num_attention_heads}, {config.num_key_value_heads}',
        'vocabulary': f'{config.vocab_size:,}',
        'longest context': f'{S} tokens',
        f"GFLOPs per {S}-token forward pass, the paper's count": f'{paper_flops(decoder, S) / 1e9:,.3f}',
        f'GFLOPs per {S}-token forward pass, exact': f'{exact_flops(decoder, S).total / 1e9:,.3f}',
    }
    if config.thinking != 'none':
        rows[f'thinking layers (of 0 to {config.num_hidden_layers - 1})'] = ', '.join(map(str, config.thinking_layers))
        rows['extra steps'] = str(config.thinking_steps)
    if config.thinking == 'itt':
        rows['fraction of tokens routed to each step'] = ', '.join(f'{ratio:g}' for ratio in config.token_ratios)
        rows['combine, thinking_kv'] = f'{config.combine}, {config.thinking_kv}'
    return rows


def _training(figures: RunFigures) -> list[str]:
    names = {'batch': 'batches', 'sample': 'sequences', 'token': 'tokens', 'hours': 'hours of training'}
    done = {
        label: f'{figures.progress[key]:,.2f}' if key == 'hours' else f'{int(figures.progress[key]):,}'
        for key, label in names.items()
        if figures.progress.get(key)
    }
    parts = ['## Training', _table(done)] if done else []
    if figures.evaluation:
        lines = ['| evaluation set | nats per token | perplexity |', '|---|---|---|']
        for name, loss in sorted(figures.evaluation.items()):
            lines.append(f'| {name} | {loss:.4f} | {math.exp(loss):.3f} |')
        parts += ['Last evaluation before the checkpoint:', '\n'.join(lines)]
    return parts


def _routing(config: PretrainedConfig) -> list[str]:
    if config.thinking != 'itt' or not config.token_routing:
        return []
    text = f'Trained with `selection: {config.selection}`; used with `selection: {config.evaluation_selection}`'
    if config.evaluation_selection == 'threshold':
        text += (
            ' (causal): a token is routed to a step when its own score exceeds a threshold set in training. The model '
            'is a left-to-right one, and its perplexity is a likelihood.'
        )
    else:
        text += (
            ' (non-causal): later tokens change whether an earlier one is routed. Its perplexity is not a likelihood, '
            'and nothing can be generated with it.'
        )
    return ['## Routing', text]


def _usage(config: PretrainedConfig) -> str:
    remote = '' if config.is_llama else ', trust_remote_code=True'
    note = '' if config.is_llama else (
        '\n\n`modeling_itt.py` holds the complete model. Where the package itt_composer is installed, '
        '`import itt_composer.model` takes the place of `trust_remote_code`.'
    )  # fmt: skip
    return (
        '## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        f"model = AutoModelForCausalLM.from_pretrained('<this folder>'{remote})\n"
        f"tokenizer = AutoTokenizer.from_pretrained('<this folder>')\n```{note}"
    )


def _table(rows: dict[str, str]) -> str:
    return '\n'.join(['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows.items())])
