"""The estimate that a run prints before it starts."""

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache
from orchestrator.cost.estimate import expected_line
from orchestrator.cost.measure import measure
from orchestrator.cost.timing import Estimate, Timing
from orchestrator.cost.tokens import TokenCounts
from orchestrator.data.dataset import Manifest
from orchestrator.runs.facts import model_facts

MEASURE_S = (
    20.0  # longest measurement of the speed; the first one in a new environment takes more than 10
)
MEASURE_FLOPS = 2e12  # of a micro-batch; more would take too long on a CPU


def estimate_of(experiment: Experiment, dataset: Manifest, layout: Layout) -> Estimate | None:
    """Estimate and print the cost of the whole run; None if it cannot be estimated within seconds.

    If the estimate fails, the run goes on.
    """
    tokens = TokenCounts.of(dataset)
    try:
        timing = _timing(experiment, dataset.tokenizer["n_vocab"], layout)
        if isinstance(timing, str):
            print(f"expected: unknown until the first minute of training is over: {timing}")
            return None
        estimate = tokens.expected(experiment, timing)
    except Exception as error:
        print(f"no estimate of the cost: {type(error).__name__}: {error}", flush=True)
        return None
    print(f"expected: {expected_line(estimate)}", flush=True)
    return estimate


def _timing(experiment: Experiment, n_vocab: int, layout: Layout) -> Timing | str:
    """Return an earlier measurement of the speed, or measure it if that is quick, or why not."""
    known = cache.read(experiment, n_vocab, layout)
    if known is not None:
        return known
    micro_batch = experiment.train.micro_batch_size * experiment.model.block_size
    flops = model_facts(experiment, n_vocab)["flops_per_token"] * micro_batch
    if flops >= MEASURE_FLOPS and not layout.use_gpu:
        return "timing a step of this model takes long on a CPU; --dry-run does it"
    return measure(experiment, n_vocab, layout, limit_s=MEASURE_S)
