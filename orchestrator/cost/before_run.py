"""The estimate that a run or a sweep prints before it starts."""

from collections.abc import Callable

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache
from orchestrator.cost.estimate import expected_line
from orchestrator.cost.measure import measure
from orchestrator.cost.timing import Estimate, Timing
from orchestrator.cost.tokens import TokenCounts
from orchestrator.data.dataset import Manifest
from orchestrator.runs.facts import model_facts

MEASURE_S = 20.0  # limit of the measurement; in a new environment, 10 s may not be enough
MEASURE_FLOPS = 2e12  # of a micro-batch; more would take too long on a CPU


def estimate_of(experiment: Experiment, dataset: Manifest, layout: Layout) -> Estimate | None:
    """Estimate and print the cost of the whole run; None if it cannot be estimated within seconds.

    If the estimate fails, the run goes on.
    """

    def estimate() -> Estimate | str:
        timing = _timing(experiment, dataset.tokenizer["n_vocab"], layout)
        if isinstance(timing, str):
            return timing
        return TokenCounts.of(dataset).expected(experiment, timing)

    return announced(estimate)


def announced(make: Callable[[], Estimate | str]) -> Estimate | None:
    """Print and return the result of `make`. If it fails or is a reason, print that: None."""
    try:
        made = make()
    except Exception as error:
        made = f"{type(error).__name__}: {error}"
    if isinstance(made, str):
        print(f"expected: unknown until the first minute of training is over: {made}", flush=True)
        return None
    print(f"expected: {expected_line(made)}", flush=True)
    return made


def _timing(experiment: Experiment, n_vocab: int, layout: Layout) -> Timing | str:
    """Return an earlier measurement of the speed, or measure it if that is quick, or why not."""
    micro_batch = experiment.train.micro_batch_size * experiment.model.block_size
    facts = model_facts(experiment, n_vocab)
    flops = (facts["flops_per_token"] or 6 * facts["parameters"]) * micro_batch
    is_slow = flops >= MEASURE_FLOPS and not layout.use_gpu
    if is_slow and cache.read(experiment, n_vocab, layout) is None:
        return "timing a step of this model takes long on a CPU; --dry-run does it"
    return measure(experiment, n_vocab, layout, limit_s=MEASURE_S)
