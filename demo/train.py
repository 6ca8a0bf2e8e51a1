"""Train the demonstration model, a Llama of 3.7 million parameters, and its tokenizer, from scratch.

The model is small enough to live in a repository, yet it has learned its texts, so quantizing it costs
perplexity the way quantizing a large model does. Every input width is a multiple of 128, the usual
group size.

    python train.py --text FILE.jsonl --out model --minutes 22 --seed 0

`--size large` trains a model of 30.5 million parameters on the same texts, for measurements of algorithms
(tests/bench/bench_quality.py). It is not part of the repository: it has 61 MB and takes hours.

The texts are the documentation of Python, Django, PostgreSQL and SQLite, as the Debian 12 documentation
packages ship it, with the markup removed; sources and licences stand in text/LICENSES.md. Each line of
a text file is {"text": ..., "source": ...}; `split.py` holds out the calibration and the evaluation
documents, neither the tokenizer nor the model sees them.

`--minutes` is turned into a number of steps by timing the first ones; `--steps` fixes that number. With
`--steps` a run repeats to the bit on the same machine with the same number of threads, unless it is
compiled: `--compile` is a fifth faster, but the compiled backward pass adds up in an order that varies.
The number of steps, the tokens, the losses and the versions are recorded in `train_info.json` beside the
model. With `--state FILE` a run saves its state every 100 steps, and continues from there if the file exists.

Shapes: B sequences of a batch, T tokens of a sequence (256), V vocabulary (2048).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from split import Document, read_documents, split_documents

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")  # ids 0, 1, 2
MAX_POSITIONS = 512
NUM_TOKENS = 256  # T
MEASURED_WINDOWS = 16  # at a time
FINAL_LEARNING_RATE_RATIO = 0.02
BETAS = (0.9, 0.95)
# More than the usual 0.1: the run passes over its small text about ten times.
WEIGHT_DECAY = 0.3
MAX_GRADIENT_NORM = 1.0
NUM_WARMUP_STEPS = 100
# The timed steps lie within the warm-up, where the learning rate does not yet depend on the number of
# steps, and after the first few, which may include compiling.
FIRST_TIMED_STEP = 10
LAST_TIMED_STEP = 50
PROGRESS_EVERY = 250
NUM_MONITOR_TOKENS = 16_384
STATE_EVERY = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a model, its peak learning rate, and the windows of a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    peak_learning_rate: float
    batch_size: int


SHAPES = {
    "small": Shape(
        hidden=256, intermediate=768, layers=4, heads=4, key_value_heads=2, peak_learning_rate=3e-3, batch_size=16
    ),
    "large": Shape(
        hidden=512, intermediate=1408, layers=10, heads=8, key_value_heads=4, peak_learning_rate=1.5e-3, batch_size=8
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainInfo:
    """What the run was; saved as `train_info.json`."""

    seed: int
    steps: int
    batch_size: int
    window: int
    tokens_seen: int
    tokens_in_text: int
    train_documents: int
    seconds: float
    final_train_loss: float
    eval_tokens: int
    eval_perplexity: float
    parameters: int
    torch: str
    transformers: str
    tokenizers: str


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no text is out of its vocabulary. It adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(shape: Shape) -> LlamaForCausalLM:
    """The untrained model, in float32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents as one row of ids, each between <bos> and <eos>."""
    texts = [document.text for document in documents]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for row in rows:
        ids += [0, *row, 1]
    return torch.tensor(ids)


def batches(tokens: Tensor, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs_BT, targets_BT). Each epoch cuts the text at another offset and shuffles it."""
    num_windows = (len(tokens) - NUM_TOKENS - 1) // NUM_TOKENS
    while True:
        offset = int(torch.randint(NUM_TOKENS, (1,), generator=generator))
        order = torch.randperm(num_windows, generator=generator)
        for first in range(0, num_windows - batch_size + 1, batch_size):
            starts = order[first : first + batch_size] * NUM_TOKENS + offset
            windows = torch.stack([tokens[start : start + NUM_TOKENS + 1] for start in starts.tolist()])
            yield windows[:, :-1], windows[:, 1:]


def loss_of(model: LlamaForCausalLM, inputs_BT: Tensor, targets_BT: Tensor, *, fast: bool) -> Tensor:
    """Mean cross-entropy in nats; `fast` computes the matrix products in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine."""
    if step < NUM_WARMUP_STEPS:
        return peak * (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / max(1, num_steps - NUM_WARMUP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (FINAL_LEARNING_RATE_RATIO + (1.0 - FINAL_LEARNING_RATE_RATIO) * cosine)


def build_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """AdamW; the norms' gains, the only vectors, are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)


def train(
    model: LlamaForCausalLM,
    tokens: Tensor,
    monitor: Tensor,
    *,
    minutes: float,
    steps: int | None,
    seed: int,
    compiled: bool,
    shape: Shape,
    state: Path | None,
) -> tuple[int, float]:
    """Train in place. Returns the number of steps and the running mean of the loss at the end.

    The perplexity on `monitor`, tokens outside the training text, is printed and decides nothing.
    """
    optimizer = build_optimizer(model, shape.peak_learning_rate)
    source = batches(tokens, torch.Generator().manual_seed(seed), shape.batch_size)
    compute_loss = torch.compile(loss_of) if compiled else loss_of
    num_steps = steps if steps is not None else NUM_WARMUP_STEPS
    mean_loss = 0.0
    started_s = timed_from_s = time.monotonic()
    step = 0
    if state is not None and state.exists():
        step, num_steps, mean_loss = load_state(state, model, optimizer)
        for _ in range(step):
            next(source)
    while step < num_steps:
        model.train()
        inputs_BT, targets_BT = next(source)
        loss = compute_loss(model, inputs_BT, targets_BT, fast=True)
        update(model, optimizer, loss, rate=learning_rate(step, num_steps, shape.peak_learning_rate))
        step += 1
        mean_loss += (loss.item() - mean_loss) * max(0.01, 1 / step)
        now_s = time.monotonic()
        if step == FIRST_TIMED_STEP:
            timed_from_s = now_s
        if step == LAST_TIMED_STEP and steps is None:
            step_s = (now_s - timed_from_s) / (LAST_TIMED_STEP - FIRST_TIMED_STEP)
            num_steps = max(NUM_WARMUP_STEPS, int(minutes * 60 / step_s))
        if step % PROGRESS_EVERY == 0 or step == num_steps:
            outside = perplexity(model, monitor)
            print(
                f"step {step}/{num_steps}  loss {mean_loss:.3f}  outside perplexity {outside:.2f}  "
                f"{now_s - started_s:.0f} s",
                flush=True,
            )
        if state is not None and step % STATE_EVERY == 0:
            save_state(state, model, optimizer, (step, num_steps, mean_loss))
    return num_steps, mean_loss


def save_state(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: tuple[int, int, float]
) -> None:
    """Write what `load_state` reads; the file is replaced as a whole."""
    new = path.with_name(path.name + ".new")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}, new)
    new.replace(path)


def load_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> tuple[int, int, float]:
    """Take over model and optimizer. Returns the steps done, the number of steps, and the mean loss."""
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    step, num_steps, mean_loss = found["progress"]
    return int(step), int(num_steps), float(mean_loss)


def update(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, loss: Tensor, *, rate: float) -> None:
    """One optimizer step; changes the model's parameters in place."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """exp(mean loss) over windows of T tokens that do not overlap; a window predicts T - 1 tokens."""
    model.train(mode=False)
    windows_WT = tokens[: len(tokens) // NUM_TOKENS * NUM_TOKENS].view(-1, NUM_TOKENS)
    total_loss = 0.0
    for first in range(0, len(windows_WT), MEASURED_WINDOWS):
        batch_BT = windows_WT[first : first + MEASURED_WINDOWS]
        loss = loss_of(model, batch_BT[:, :-1], batch_BT[:, 1:], fast=False)
        total_loss += loss.item() * len(batch_BT)
    return math.exp(total_loss / len(windows_WT))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model in bfloat16 and its tokenizer, so that the Auto classes load them."""
    config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)  # type: ignore[no-untyped-call]
    model.generation_config = config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=22.0, help="about how long to train")
    parser.add_argument("--steps", type=int, help="train exactly so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=tuple(SHAPES), default="small")
    parser.add_argument("--state", type=Path, metavar="FILE", help="save the state there, and continue from it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="a fifth faster, not repeatable to the bit")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, measure, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    split = split_documents(read_documents(arguments.text))
    tokenizer = train_tokenizer(split.train)
    train_tokens = tokenize(split.train, tokenizer)
    eval_tokens = tokenize(split.eval, tokenizer)
    shape = SHAPES[arguments.size]
    model = build_model(shape)
    print(
        f"{len(split.train)} documents, {len(train_tokens)} tokens, {model.num_parameters()} parameters",
        flush=True,
    )
    started_s = time.monotonic()
    num_steps, final_loss = train(
        model,
        train_tokens,
        tokenize(split.calib, tokenizer)[:NUM_MONITOR_TOKENS],
        minutes=arguments.minutes,
        steps=arguments.steps,
        seed=arguments.seed,
        compiled=arguments.compile,
        shape=shape,
        state=arguments.state,
    )
    seconds = time.monotonic() - started_s
    model.bfloat16()
    info = TrainInfo(
        seed=arguments.seed,
        steps=num_steps,
        batch_size=shape.batch_size,
        window=NUM_TOKENS,
        tokens_seen=num_steps * shape.batch_size * NUM_TOKENS,
        tokens_in_text=len(train_tokens),
        train_documents=len(split.train),
        seconds=round(seconds, 1),
        final_train_loss=round(final_loss, 4),
        eval_tokens=len(eval_tokens),
        eval_perplexity=round(perplexity(model, eval_tokens), 3),
        parameters=model.num_parameters(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )
    save(model, tokenizer, arguments.out)
    (arguments.out / "train_info.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
    print(f"perplexity on {info.eval_tokens} held-out tokens: {info.eval_perplexity}")


if __name__ == "__main__":
    main()
