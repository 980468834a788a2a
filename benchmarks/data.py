"""Tokens per second of `make data` against two other pipelines and the bare tokenizer, on the same text in one run.

    python benchmarks/data.py --sample <folder of domains> --tokenizer <tokenizer.model> [--megabytes 24] [--memory]

- `ours`: `data_prep.convert` with one worker and with two, from an empty folder to the manifest; the time excludes
  the start (imports, tokenizer, census), which does not grow with the input.
- `bare`: the Rust tokenizer alone, on one thread, given the same documents in the same batches; and in two processes,
  for the gain from the machine's second core.
- `shearing`: LLM-Shearing's pipeline as its description has it: sentencepiece on each line, tokens with BOS and EOS
  cut into rows with numpy, one .npy file for each input file, and these then written as MDS.
- `foundry`: llm-foundry's `convert_dataset_json` with `concat_tokens`.

The pipelines take turns, so that a machine that slows down slows all of them, and a ratio is the median over rounds of
the ratio within a round. `--scaling` measures one process against two and nothing else, for a larger input: what each
worker does once (start, load the tokenizer, fill the word cache) takes about a second. `--memory` measures the peak of
one worker for a 20 MB and a 2 GB input instead; that takes some minutes and 6 GB of disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
SEQ_LEN = 4096
BATCH_BYTES = 1 << 20


def lines_of(sample: Path) -> list[bytes]:
    lines = [line for path in sorted(sample.glob('*/*.jsonl')) for line in path.read_bytes().splitlines(keepends=True)]
    if not lines:
        raise SystemExit(f'benchmark: {sample}: no <domain>/*.jsonl with text there')
    return lines


def write_input(sample: Path, folder: Path, size: int, files: int) -> None:
    """Write ``size`` bytes of the sample's lines as files of one domain; each document has its own first word."""
    (folder / 'mixed').mkdir(parents=True)
    lines = lines_of(sample)
    written = number = 0
    for i in range(files):
        with open(folder / 'mixed' / f'{i}.jsonl', 'wb') as file:
            while written < size * (i + 1) // files:
                text = json.loads(lines[number % len(lines)])['text']
                written += file.write(json.dumps({'text': f'{number} {text}'}, ensure_ascii=False).encode() + b'\n')
                number += 1


def texts_of(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob('*/*.jsonl')):
        with open(path, encoding='utf-8') as lines:
            yield from (json.loads(line)['text'] for line in lines)


def bare(processes: int) -> Callable[[Path, Path, Path], tuple[int, float]]:
    def tokenise_all(folder: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
        from data_prep.tokens.tokenizer import load_saved, save_tokenizer

        save_tokenizer(str(tokenizer), [], out / 'tokenizer')
        rust = load_saved(out / 'tokenizer')
        batches: list[list[str]] = [[]]
        size = 0
        for text in texts_of(folder):
            batches[-1].append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
        # A fork has the tokenizer and the texts already.
        with get_context('fork').Pool(processes, _share, (rust, batches)) as pool:
            begun = time.perf_counter()
            tokens = sum(pool.imap_unordered(_count, range(len(batches))))
            return tokens, time.perf_counter() - begun

    return tokenise_all


_shared: tuple[Any, list[list[str]]]


def _share(rust: Any, batches: list[list[str]]) -> None:
    global _shared
    _shared = rust, batches


def _count(batch: int) -> int:
    rust, batches = _shared
    return sum(len(encoding.ids) + 2 for encoding in rust.encode_batch_fast(batches[batch], add_special_tokens=False))


def ours(workers: int) -> Callable[[Path, Path, Path], tuple[int, float]]:
    def convert_all(folder: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
        from data_prep import engines, finish  # noqa: F401  (their imports are no part of the figure)
        from data_prep.conversion import convert

        begun = 0.0

        def announce(_: object) -> None:
            nonlocal begun
            begun = time.perf_counter()

        # Two work items for each file, and no small third one.
        work_item_bytes = max(path.stat().st_size for path in folder.glob('*/*.jsonl')) // 2 + 1
        manifest = convert(
            folder, out, str(tokenizer), SEQ_LEN, 20_000, workers, work_item_bytes=work_item_bytes, announce=announce
        )
        seconds = time.perf_counter() - begun
        domains = manifest['domains'].values()
        return sum(d[split]['tokens'] for d in domains for split in ('train', 'validation')), seconds

    return convert_all


def shearing(folder: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    from sentencepiece import SentencePieceProcessor
    from streaming import MDSWriter

    processor = SentencePieceProcessor(model_file=str(tokenizer))
    begun = time.perf_counter()
    tokens = 0
    out.mkdir()
    for path in sorted(folder.glob('*/*.jsonl')):
        buffer: list[int] = []
        rows = []
        with open(path, encoding='utf-8') as lines:
            for line in lines:
                ids = [1, *processor.encode(json.loads(line)['text']), 2]
                tokens += len(ids)
                buffer += ids
                while len(buffer) >= SEQ_LEN:
                    rows.append(np.array(buffer[:SEQ_LEN], np.uint16))
                    buffer = buffer[SEQ_LEN:]
        np.save(out / f'{path.stem}.npy', np.stack(rows))
    with MDSWriter(out=str(out / 'mds'), columns={'tokens': 'bytes', 'set': 'str'}) as writer:
        for path in sorted(out.glob('*.npy')):
            for row_S in np.load(path):
                writer.write({'tokens': row_S.tobytes(), 'set': 'mixed'})
    return tokens, time.perf_counter() - begun


def foundry(folder: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    from llmfoundry.command_utils import convert_dataset_json
    from streaming import LocalDataset

    from data_prep.tokens.tokenizer import save_tokenizer

    out.mkdir()
    save_tokenizer(str(tokenizer), [], out / 'tokenizer')
    os.environ['HF_HOME'] = str(out / 'cache')
    os.environ['WORLD_SIZE'] = '1'
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert_dataset_json(
            path=str(folder / 'mixed'),
            out_root=str(out / 'mds'),
            compression=None,
            concat_tokens=SEQ_LEN,
            split='train',
            tokenizer=str(out / 'tokenizer'),
            eos_text='</s>',
        )
    return len(LocalDataset(str(out / 'mds'))) * SEQ_LEN, time.perf_counter() - begun


PIPELINES: dict[str, Callable[[Path, Path, Path], tuple[int, float]]] = {
    'bare, 1 process': bare(1),
    'bare, 2 processes': bare(2),
    'ours, 1 worker': ours(1),
    'ours, 2 workers': ours(2),
    'shearing': shearing,
    'foundry': foundry,
}


def in_process(function: Callable[..., Any], *arguments: object) -> Any:
    """The result of a call in a fresh process, one that may have processes of its own."""
    context = get_context('spawn')
    queue = context.SimpleQueue()
    child = context.Process(target=_put, args=(queue, function, *arguments))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f'{function.__name__}{arguments} failed')
    return queue.get()


def _put(queue: Any, function: Callable[..., Any], *arguments: object) -> None:
    with open(os.devnull, 'w') as nothing, contextlib.redirect_stderr(nothing):
        result = function(*arguments)
    queue.put(result)


def measure(name: str, folder: Path, tokenizer: Path) -> float:
    """Tokens per second in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens, seconds = in_process(_call, name, folder, tokenizer, Path(scratch, 'out'))
    typer.echo(f'{name}: {tokens:,} tokens in {seconds:.2f} s')
    return tokens / seconds


def _call(name: str, folder: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    return PIPELINES[name](folder, tokenizer, out)


def _peak(folder: Path, tokenizer: Path, out: Path) -> int:
    from data_prep.conversion import convert

    convert(folder, out, str(tokenizer), SEQ_LEN, 20_000, 1)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10


def show_memory(sample: Path, tokenizer: Path) -> None:
    for size in (20_000_000, 2_000_000_000):
        with tempfile.TemporaryDirectory() as scratch:
            write_input(sample, Path(scratch, 'in'), size, 1)
            peak = in_process(_peak, Path(scratch, 'in'), tokenizer, Path(scratch, 'out'))
        typer.echo(f'{size / 1e6:6,.0f} MB in one file: peak of the worker {peak} MiB')


def main(
    sample: Annotated[Path, typer.Option(help='A folder of domains of .jsonl files.')],
    tokenizer: Annotated[Path, typer.Option(help="LLaMA's tokenizer.model.")],
    megabytes: Annotated[int, typer.Option(help='Size of the input.')] = 24,
    rounds: Annotated[int, typer.Option(help='How often each pipeline runs.')] = 2,
    scaling: Annotated[bool, typer.Option('--scaling', help='Compare one process with two, and nothing else.')] = False,
    memory: Annotated[bool, typer.Option('--memory', help='Measure peak memory instead.')] = False,
) -> None:
    if memory:
        return show_memory(sample, tokenizer)
    names = [name for name in PIPELINES if not scaling or name.startswith(('bare', 'ours'))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, 'in')
        write_input(sample, folder, megabytes * 1_000_000, 4)
        rates = [{name: measure(name, folder, tokenizer) for name in names} for _ in range(rounds)]
    reference = 'ours, 1 worker'
    table = Table()
    for column in ('pipeline', 'tokens/s', f'{reference}, over it'):
        table.add_column(column, justify='left' if column == 'pipeline' else 'right')
    for name in names:
        ratio = statistics.median(rate[reference] / rate[name] for rate in rates)
        table.add_row(name, f'{statistics.median(rate[name] for rate in rates):,.0f}', f'{ratio:.2f}')
    Console().print(table)
    for name, one, two in (('bare', 'bare, 1 process', 'bare, 2 processes'), ('ours', reference, 'ours, 2 workers')):
        typer.echo(f'{name}, two over one: {statistics.median(rate[two] / rate[one] for rate in rates):.2f}')
    typer.echo(f'load at the end: {os.getloadavg()[0]:.1f}')
    return None


if __name__ == '__main__':
    typer.run(main)
