"""Workers on GPUs, started by torchrun, write the same bytes as a single process on one GPU."""

from __future__ import annotations

import pytest
import torch

import runtime.cli.app
from tests.runtime.small import EXPERTS, WIDTHS, make_small
from tests.runtime.worker_runs import Call, Fault, happening, run_workers
from tests.runtime.workshop import GPTQ, Workshop, copy_unfinished, files_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Models, and the checkpoints of a single process."""
    folder = tmp_path_factory.mktemp("workers")
    tied = {**WIDTHS, "tie_word_embeddings": True}
    dense = make_small(folder / "dense", "LlamaForCausalLM", "LlamaConfig", tied, dtype=torch.bfloat16)
    experts = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    mixture = make_small(folder / "mixture", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", experts)
    made = Workshop(folder, dense, mixture, device="cuda")
    for name in made.models:
        assert runtime.cli.app.main(made.command(name, made.out(name, 0))) == 0, name
    return made


def require_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"NCCL needs a GPU for each worker: {count} workers, {torch.cuda.device_count()} GPUs")


def assert_equal(shop: Workshop, size: int) -> None:
    calls = [Call(shop.command(name, shop.out(name, size))) for name in shop.models]
    outcome = run_workers(calls, size, shop.folder)
    assert outcome.codes == (0,), outcome.errors
    for name in shop.models:
        assert files_of(shop.out(name, size)) == files_of(shop.out(name, 0)), name


def test_one_worker(shop: Workshop) -> None:
    assert_equal(shop, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_several_workers(shop: Workshop, size: int) -> None:
    require_gpus(size)
    assert_equal(shop, size)


def test_memory_that_runs_out_on_one_worker_makes_the_batches_of_all_smaller(shop: Workshop) -> None:
    require_gpus(2)
    out, expected = shop.folder / "smaller", shop.folder / "smaller-0"
    with happening(Fault(rank=0, kind="memory", samples=2)):
        assert runtime.cli.app.main(shop.command(GPTQ, expected)) == 0
    call = Call(shop.command(GPTQ, out), Fault(rank=1, kind="memory", samples=2))
    assert run_workers([call], 2, shop.folder).codes == (0,)
    assert files_of(out) == files_of(expected)


def test_a_killed_run_is_resumed_with_another_number_of_workers(shop: Workshop) -> None:
    require_gpus(2)
    killed = Call(shop.command(GPTQ, shop.folder / "killed"), Fault(rank=1, kind="kill", target="model.layers.2", at=2))
    outcome = run_workers([killed], 2, shop.folder, torchrun=None)
    assert outcome.codes == (2, -9)
    assert outcome.errors[0].startswith("runtime: error: worker 1 on ")
    for size in (1, 2):
        again = copy_unfinished(shop.folder / "killed", shop.folder / f"again-{size}")
        outcome = run_workers([Call(shop.command(GPTQ, again, "--resume"))], size, shop.folder)
        assert outcome.codes == (0,), outcome.errors
        assert files_of(again) == files_of(shop.out(GPTQ, 0))
