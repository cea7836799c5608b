"""train.compile: what was compiled before, shapes, samples, workers and kills change no bits."""

import functools

import pytest
import torch
from torch import Tensor

from model import models
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import regions
from tests.helpers import train_rank
from tests.helpers.curves import final_outcome
from tests.train.test_kinds import EVERY_PART, KINDS, SHAPE, SMALL
from tests.train.test_overlap import Recorded, of

VOCABULARY = 16
TINY = [
    "model.n_layer=1",
    "model.n_head=1",
    "model.n_embd=16",
    "model.block_size=4",
    "train.dtype=float32",
    "train.compile=true",
]


class Graphs:
    """A backend that records the arguments of each graph, and does not compile it."""

    def __init__(self) -> None:
        self.arguments: list[list[object]] = []

    def __call__(
        self, graph: torch.fx.GraphModule, arguments: list[object]
    ) -> torch.fx.GraphModule:
        self.arguments.append(arguments)
        return graph


def use(monkeypatch, backend) -> None:
    """Let torch.compile use a backend that needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def compiled_state(*words: str) -> state.TrainState:
    experiment = load_experiment(None, [*TINY, *words])
    return state.build(experiment, experiment.new_model(VOCABULARY), Worker(cpus=1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_model_of_a_process_is_compiled_for_its_shapes(monkeypatch, device):
    # Of a function, torch compiles 8 kinds, and the second one for all shapes.
    graphs = Graphs()
    use(monkeypatch, graphs)
    compiled = models.compiled
    monkeypatch.setattr(models, "compiled", lambda model, _: compiled(model, device))
    for number in range(1, 6):
        sizes = [f"train.micro_batch_size={number}", f"train.global_batch_size={number}"]
        forward = compiled_state(*sizes).forward
        tokens = torch.zeros(number, 4, dtype=torch.int64)
        forward(tokens, tokens).backward()
        forward.eval()
        with torch.no_grad():
            forward(tokens, tokens, reduction="window")
        assert len(graphs.arguments) == 2 * number
    assert all(isinstance(argument, Tensor) for graph in graphs.arguments for argument in graph)


def test_all_blocks_are_compiled_though_each_needs_code_of_its_own(monkeypatch):
    graphs = Graphs()
    use(monkeypatch, graphs)
    model = load_experiment(None, [*TINY, "model.n_layer=10"]).new_model(VOCABULARY)
    for layer, block in enumerate(model.blocks):
        block.mlp.gelu = torch.nn.LeakyReLU(layer / 20)
    forward = models.compiled(model, "cpu")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    forward(tokens, tokens)
    assert len(graphs.arguments) == 10


@pytest.mark.parametrize("blocks", [3, torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4)})])
def test_model_whose_blocks_are_no_modules_is_compiled_as_a_whole(monkeypatch, blocks):
    graphs = Graphs()
    use(monkeypatch, graphs)
    model = torch.nn.Linear(4, 4)
    model.blocks = blocks
    models.compiled(model, "cpu")(torch.zeros(1, 4))
    assert len(graphs.arguments) == 1
    with pytest.raises(ValueError, match="needs a model with `blocks`"):
        models.checkpoint_activations(model)


def test_exchange_begins_before_the_first_block_has_gradients(monkeypatch):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    calls: list[bool] = []  # of compiled backward passes: whether something was sent before

    def forward_of(graph: torch.fx.GraphModule, _: list[Tensor]):
        return make_boxed_func(graph.forward)

    def backward_of(graph: torch.fx.GraphModule, _: list[Tensor]):
        def run(*arguments: Tensor) -> list[Tensor]:
            if gradients.overlap.has_begun:
                is_first_block = len(calls) == 2
                calls.append(is_first_block and group.has_sent.wait(60))
            return graph.forward(*arguments)

        return make_boxed_func(run)

    use(monkeypatch, aot_autograd(fw_compiler=forward_of, bw_compiler=backward_of))
    monkeypatch.setattr(regions, "LEAST_OVERLAPPING_BUCKET", 1 << 10)
    monkeypatch.setattr(regions, "LEAST_PIECE", 1 << 7)
    model = load_experiment(None, [*TINY, "model.n_layer=3"]).new_model(VOCABULARY)
    forward = models.compiled(model, "cpu")
    group = Recorded()
    gradients = of(model, group)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for slot in gradients.my_slots():
        gradients.begin_slot()
        gradients.begin_backward(slot[-1])
        forward(tokens, tokens).backward()
        gradients.end_slot()
    gradients.reduce()
    assert calls == [False, False, True]


def test_samples_compile_no_code_for_their_lengths(monkeypatch, tiny_dataset, folder):
    graphs = Graphs()
    use(monkeypatch, graphs)
    words = [*SMALL, *SHAPE, "train.compile=true", "train.max_steps=1", "train.eval_interval=1"]
    train(load_experiment(None, words), folder, tiny_dataset)
    assert folder.sample_file(1).read_text("utf-8")
    assert len(graphs.arguments) == 2  # a step, an evaluation


def test_run_that_was_compiled_as_a_whole_is_not_continued(monkeypatch, tiny_dataset, folder):
    use(monkeypatch, Graphs())
    words = [*SMALL, *SHAPE, "train.compile=true", "train.eval_interval=null"]
    with monkeypatch.context() as before:
        before.setattr(models, "compiled", lambda model, _: torch.compile(model))
        now = state.fingerprint
        before.setattr(state, "fingerprint", lambda *args: {**now(*args), "compile": True})
        train(load_experiment(None, [*words, "train.max_steps=1"]), folder, tiny_dataset)
    with pytest.raises(UserError, match="compile: before True, now 'by block'.*allow_drift=true"):
        train(load_experiment(None, words), folder, tiny_dataset)


COMPILED = {
    EVERY_PART: KINDS[EVERY_PART],
    "gpt2, bfloat16, activations again": [
        *KINDS["gpt2 and muon"],
        "train.dtype=bfloat16",
        "train.activation_checkpointing=true",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_run_killed_on_two_nodes_and_resumed_on_one_equals_the_whole(
    name, tiny_dataset, tmp_path
):
    words = [*SMALL, *COMPILED[name], "train.compile=true", "train.max_steps=20"]
    whole, cut = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    whole.path.mkdir()
    train(load_experiment(None, words), whole, tiny_dataset, Worker(cpus=1))
    ranks = train_rank.start(cut, tiny_dataset, words, 2, "AB", killed_after=8, bucket=1 << 12)
    while max(cut.checkpoint_steps(), default=0) < 8:
        assert all(rank.is_alive() for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert max(cut.checkpoint_steps()) < 20
    train(load_experiment(None, words), cut, tiny_dataset, Worker(cpus=1))
    assert final_outcome(cut) == final_outcome(whole)
