"""Every mistake in a user's file ends in one line with the file and the line in it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import optim
from model.optim import OPTIMIZERS
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.own_code import is_own
from orchestrator.own_files import load_copies, present, store
from orchestrator.own_optimizer import SETTINGS, _Tiny
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.train.step import Step

HERE = Path(__file__).parent
CONV = (HERE / "conv.py").read_text()
LION = (HERE / "lion.py").read_text()
CLASS = "class GatedConv(nn.Module):"
INIT = "    def __init__(self, config):"
FORWARD = "    def forward(self, tokens, targets=None, *, reduction="
GROUPS = "    def parameter_groups(self):"
SET = "def init_weights(self, seed)"
BLOCKS = "        self.blocks = nn.Sequential("
# label: (what is replaced, by what, text of the line that the error names, part of the message)
MODEL_MISTAKES = {
    "syntax": (CLASS, "class GatedConv(nn.Module:", "class GatedConv(nn.Module:", "SyntaxError"),
    "null byte": (CLASS, f"\0{CLASS}", None, "null bytes"),
    "import": (CLASS, f"1 / 0\n\n\n{CLASS}", "1 / 0", "ZeroDivisionError: division by zero"),
    "exit": (CLASS, f"raise SystemExit(3)\n{CLASS}", "raise SystemExit(3)", "SystemExit: 3"),
    "missing library": (CLASS, f"import nolib\n{CLASS}", "import nolib", "No module named 'nolib'"),
    "sibling": (CLASS, f"import lion\n{CLASS}", "import lion", "not an installed library"),
    "relative": (CLASS, f"from . import x\n{CLASS}", "from . import x", "not an installed library"),
    "orchestrator": (
        CLASS,
        f"import orchestrator.files\n{CLASS}",
        "import orch",
        "not an installed",
    ),
    "no class": (CLASS, "class Other(nn.Module):", '"""A language', "it has Block, Other"),
    "no module": (CLASS, "class GatedConv:", "class GatedConv", "inherits from torch.nn.Module"),
    "no config": ("class Config:", "class Settings:", CLASS, "needs a class Config"),
    "not frozen": ("@dataclass(frozen=True)", "@dataclass", CLASS, "frozen=True"),
    "no dataclass": ("    @dataclass(frozen=True)\n", "", CLASS, "frozen=True"),
    "no vocab_size": ("        vocab_size: int = 256\n", "", CLASS, "vocab_size in its Config"),
    "no default": ("kernel: int = ", "own: int\n        kernel: int = ", None, "TypeError"),
    "first without default": (
        "block_size: int = 64",
        "own: int\n        block_size: int = 64",
        "        own: int",
        "Config.own: it has no default",
    ),
    "type": (
        "width: int",
        "width: list",
        "        width: list",
        "Config.width: its type is not int",
    ),
    "unknown type": ("width: int", "width: 'Nope'", "class Config", "'Nope' is not defined"),
    "default": (
        "kernel: int = field(default=4",
        "kernel: int = field(default='a'",
        "        kernel: int",
        "the default 'a' is not of its type",
    ),
    **{
        f"default {value}": (
            "width: int = field(default=64",
            f"width: {kind} = field(default={value}",
            "        width:",
            f"Config.width: the default {value} is not of its type, or is not allowed",
        )
        for kind, value in (("int", "1.0"), ("int", "True"), ("str", "''"))
    },
    "default nan": (
        "width: int = field(default=64",
        "width: float = field(default=float('nan')",
        "        width: float",
        "Config.width: the default nan is not",
    ),
    "no init": (
        "width: int = field(default=64",
        "width: int = field(init=False, default=64",
        "        width: int",
        "Config.width: it has init=False",
    ),
    "private field": ("width: int", "_width: int", "        _width: int", "begins with _"),
    "block_size text": (
        "block_size: int = 64",
        "block_size: str = '64'",
        "        block_size: str",
        "Config.block_size: its type is not int",
    ),
    "block_size zero": (
        "block_size: int = 64",
        "block_size: int = 0",
        "        block_size: int",
        "Config.block_size: the default 0 is not",
    ),
    "taken name": (
        "width: int = field(default=64",
        "replace: int = field(default=64",
        "        replace: int",
        "every model has something of this name",
    ),
    "post init": (
        "            if self.kernel",
        "            if 1 / 0 and self.kernel",
        "            if 1 / 0",
        "ZeroDivisionError",
    ),
    "constructor": (BLOCKS, f"        [][0]\n{BLOCKS}", "        [][0]", "IndexError"),
    "constructor exits": (
        BLOCKS,
        f"        raise SystemExit(3)\n{BLOCKS}",
        "        raise SystemExit(3)",
        "SystemExit: 3",
    ),
    "post init exits": (
        "            if self.kernel",
        "            raise SystemExit(3)\n            if self.kernel",
        "            raise SystemExit(3)",
        "SystemExit: 3",
    ),
    "lazy": (BLOCKS, f"        self.more = nn.LazyLinear(3)\n{BLOCKS}", INIT, "LazyModule"),
    "not contiguous": (
        BLOCKS,
        f"        self.more = nn.Parameter(torch.randn(4, 6).t())\n{BLOCKS}",
        INIT,
        "parameter more is not contiguous",
    ),
    "constructor of torch": (
        BLOCKS,
        f"        torch.zeros(2) @ torch.zeros(3)\n{BLOCKS}",
        "        torch.zeros(2)",
        "RuntimeError",
    ),
    "float64": (
        BLOCKS,
        f"        self.more = nn.Parameter(torch.zeros(1).double())\n{BLOCKS}",
        INIT,
        "parameter more is torch.float64, not torch.float32",
    ),
    "numpy": (
        BLOCKS,
        f"        import numpy\n        self.more = nn.Parameter(torch.tensor("
        f"numpy.random.rand(3)).float())\n{BLOCKS}",
        INIT,
        "the first weights differ with the same seed of torch",
    ),
    "no forward": (
        FORWARD,
        "    def forwards(self, tokens, targets=None, *, reduction=",
        CLASS,
        "forward",
    ),
    "no keyword": (
        '*, reduction="mean", cache=None):',
        'cache=None):\n        reduction = "mean"',
        "    def forward(self, tokens",
        "unexpected keyword argument 'reduction'",
    ),
    "forward raises": (
        "        logits = self.head(x).float()",
        "        logits = self.head(x[:, :, 1:]).float()",
        "        logits =",
        "RuntimeError: mat1 and mat2",
    ),
    "whole context": (
        "        logits = self.head(x).float()",
        "        x = x + x.new_zeros(40, 1)[: x.size(1)]\n        logits = self.head(x).float()",
        "        x = x + x.new_zeros",
        "RuntimeError: The size of tensor",
    ),
    "all positions": (
        "self.head(x[:, -1:])",
        "self.head(x)",
        FORWARD,
        "forward(tokens) returns (2, 16, 256), expected (2, 1, 256)",
    ),
    "no tensor": ("self.head(x[:, -1:])", "None", FORWARD, "forward(tokens) returns NoneType"),
    "no scalar": (
        "losses.sum() / (targets >= 0).sum()",
        "losses",
        FORWARD,
        "forward(tokens, targets) returns (2, 16), expected ()",
    ),
    "not finite": (
        "losses.sum() / (targets >= 0).sum()",
        "losses.sum() / 0",
        FORWARD,
        "forward(tokens, targets) is not finite",
    ),
    "no gradient": (
        "logits = self.head(x)",
        "logits = self.head(x).detach()",
        FORWARD,
        "no gradient",
    ),
    "float64 loss": (
        "losses.sum() / (targets >= 0).sum()",
        "losses.double().sum() / (targets >= 0).sum()",
        FORWARD,
        "the loss is torch.float64",
    ),
    "window": ("losses.sum(1, dtype", "losses.mean(1, dtype", FORWARD, "reduction='window' gives"),
    "mean": ("(targets >= 0).sum()", "targets.numel()", FORWARD, "reduction='mean' gives"),
    "random": (
        "x = self.dropout(self.blocks",
        "import random; x = random.random() * self.dropout(self.blocks",
        FORWARD,
        "two losses of the same tokens differ",
    ),
    "future": (
        "F.pad(y, (self.shift.kernel_size[0] - 1, 0))",
        "F.pad(y, (self.shift.kernel_size[0] - 2, 1))",
        FORWARD,
        "depends on later tokens",
    ),
    "batch norm": (
        "nn.Dropout(config.dropout)",
        "nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(config.width), nn.Unflatten(0, (-1, 16)))",
        FORWARD,
        "changes the buffer dropout.1.running_mean",
    ),
    "future behind a zero": (
        "\n\n    def forward(self, x):  # (B, T, width)\n",
        "\n        self.leak = nn.Parameter(torch.zeros(1))\n\n    def forward(self, x):\n"
        "        x = x + self.leak * x.mean(1, keepdim=True)\n",
        FORWARD,
        "depends on later tokens",
    ),
    "groups forget": (
        "        return groups",
        "        return {'head': []}",
        GROUPS,
        "misses embedding",
    ),
    "groups double": (
        "        return groups",
        '        groups["head"] *= 2\n        return groups',
        GROUPS,
        "has head.weight 2 times",
    ),
    "groups unknown": (
        "        return groups",
        '        groups["mine"] = ["x"]\n        return groups',
        GROUPS,
        "has the group 'mine'",
    ),
    "groups of vectors": (
        'inner = "matrix" if parameter.dim() == 2 else "scalar"',
        'inner = "matrix"',
        GROUPS,
        "has blocks.0.norm.weight in matrix, which has 1 dimensions",
    ),
    **{
        f"init_weights {label}": (GROUPS, f"    {signature}:\n        {body}\n\n{GROUPS}", *found)
        for label, signature, body, *found in (
            (
                "without seed",
                "def init_weights(self)",
                "pass",
                "def init_weights",
                "takes 1 positional argument but 2 were given",
            ),
            ("raises", SET, "1 / 0", "        1 / 0", "ZeroDivisionError: division by zero"),
            (
                "of numpy",
                SET,
                "import numpy; self.head.weight.fill_(numpy.random.rand())",
                SET,
                "the first weights differ with the same seed of torch",
            ),
            (
                "adds a parameter",
                SET,
                "self.more = nn.Parameter(torch.ones(1))",
                SET,
                'Unexpected key(s) in state_dict: "more"',
            ),
            (
                "sets a buffer",
                SET,
                'self.register_buffer("angles", torch.ones(1), persistent=False)',
                SET,
                "the buffer angles is not in the state dict, so a checkpoint does not have it",
            ),
        )
    },
}
STEP = "    def step(self, closure=None):"
FACTORY = "def lion(groups, settings):"
OPTIMIZER_MISTAKES = {
    "no factory": (
        FACTORY,
        "def lio(groups, settings):",
        '"""The',
        "has no lion; it has Lion, lio",
    ),
    "no function": (FACTORY, "lion = 3\ndef lio(groups, settings):", "lion = 3", "not a function"),
    "no optimizer": ("return Lion(groups", "return (groups", FACTORY, "returns tuple"),
    "raises": ("return Lion(", "return Nope(", "    return Nope", "NameError"),
    "one group": (
        "return Lion(groups",
        "return Lion(groups[:1]",
        FACTORY,
        "parameter embedding0 is not",
    ),
    "own groups": (
        "return Lion(groups",
        'return Lion([{"params": g["params"]} for g in groups]',
        FACTORY,
        "a group has no lr_scale",
    ),
    "step raises": ("torch.lerp(gradient", "torch.lerp(gradient[1:]", "torch.lerp", "RuntimeError"),
    "number": (
        "                if not state:",
        '                state["count"] = 1\n                if "momentum" not in state:',
        FACTORY,
        "state['count'] is int; only tensors are stored",
    ),
    **{
        f"key {key!r}": (
            'state["momentum"] = torch.zeros_like(parameter)',
            f'state["momentum"] = state[{key!r}] = torch.zeros_like(parameter)',
            FACTORY,
            f"state has the key {key!r}",
        )
        for key in (3, "../x")
    },
    "exits": (
        STEP,
        f"{STEP}\n        raise SystemExit(3)",
        "        raise SystemExit",
        "SystemExit",
    ),
    "parameter of its own": (
        "return Lion(groups",
        'return Lion([*groups, {**groups[0], "params": [torch.nn.Parameter(torch.ones(2))]}]',
        FACTORY,
        "a parameter in its groups is not one of the model",
    ),
    "other memory": (
        'parameter.add_(update, alpha=-group["lr"])',
        'parameter.data = parameter - group["lr"] * update',
        FACTORY,
        "an update gives matrix0 other memory",
    ),
    "list of all": (
        'parameter in group["params"]:',
        'parameter, _ in zip(group["params"], range(2), strict=True):',
        "strict=True",
        "ValueError: zip()",
    ),
    "hidden state": (
        STEP,
        f"{STEP}\n        self.count = getattr(self, 'count', 0) + 1\n"
        "        for group in self.param_groups:\n            group['lr'] /= self.count",
        FACTORY,
        "an update after a restart would differ",
    ),
}


def refusal(field: str, file: Path, name: str) -> str:
    with pytest.raises(UserError) as refused:
        load_experiment(None, [f"{field}={file}:{name}"])
    return str(refused.value).removeprefix("command line: ")


def line_of(text: str, part: str | None) -> int:
    if part is None:
        return 0
    return next(n for n, line in enumerate(text.split("\n"), 1) if part in line)


def edited(text: str, before: str, after: str) -> str:
    assert before in text
    return text.replace(before, after, 1)


@pytest.mark.parametrize("label", MODEL_MISTAKES)
def test_mistake_in_a_model_is_one_line(label, tmp_path):
    before, after, place, message = MODEL_MISTAKES[label]
    text = edited(CONV, before, after)
    (tmp_path / "conv.py").write_text(text)
    (tmp_path / "lion.py").write_text(LION)
    found = refusal("model.kind", tmp_path / "conv.py", "GatedConv")
    assert "\n" not in found
    assert message in found
    assert found.startswith(f"{tmp_path}/conv.py:")
    if place is not None:
        assert found.startswith(f"{tmp_path}/conv.py:{line_of(text, place)}: "), found


@pytest.mark.parametrize("label", OPTIMIZER_MISTAKES)
def test_mistake_in_an_optimizer_is_one_line(label, tmp_path):
    before, after, place, message = OPTIMIZER_MISTAKES[label]
    text = edited(LION, before, after)
    (tmp_path / "lion.py").write_text(text)
    found = refusal("optim.kind", tmp_path / "lion.py", "lion")
    assert "\n" not in found
    assert message in found
    assert found.startswith(f"{tmp_path}/lion.py:{line_of(text, place)}: "), found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{'m' * 181}.py", "has 181 bytes before .py"),
        (f"{'é' * 91}.py", "has 182 bytes before .py"),
        ("a\u202eb.py", "a\\u202eb.py' has a character that cannot be printed"),
    ],
    ids=["long", "bytes", "not printable"],
)
def test_name_that_its_copy_cannot_have_is_one_line(name, says, tmp_path):
    (tmp_path / name).write_text(CONV)
    found = refusal("model.kind", tmp_path / name, "GatedConv")
    assert says in found
    assert "\n" not in found and found.isprintable()


def test_longest_name_has_a_copy(tmp_path):
    file = tmp_path / f"{'m' * 180}.py"
    file.write_text(CONV)
    experiment = load_experiment(None, [f"model.kind={file}:GatedConv"])
    store(tmp_path / "code", [experiment.model.kind])
    [copy] = (tmp_path / "code").iterdir()
    assert copy.read_text() == CONV


def test_address_of_a_file_is_refused():
    found = refusal("model.kind", "s3://bucket/conv.py", "GatedConv")
    assert "model.kind: 's3://bucket/conv.py' is an address" in found


def test_module_of_the_current_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "mine" / "conv.py").write_text(
        edited(CONV, CLASS, f"import helper_of_mine\n{CLASS}")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = refusal("model.kind", Path("mine/conv.py"), "GatedConv")
    assert found.startswith("mine/conv.py:26: imports helper_of_mine, which is not an installed")


def test_only_installed_libraries_are_imported(tmp_path, monkeypatch):
    (tmp_path / "helperx.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "conv.py"
    for line in ("import helperx", "from tests.own.conv import Block"):
        file.write_text(edited(CONV, CLASS, f"{line}\n{CLASS}"))
        assert "not an installed library" in refusal("model.kind", file, "GatedConv")
    more = "import numpy\nimport safetensors.torch\nfrom model.gpt import GPT\nimport zlib\n"
    optional = "try:\n    import nolib\nexcept ImportError:\n    nolib = None\n"
    file.write_text(edited(CONV, CLASS, f"{more}{optional}{CLASS}"))
    assert load_experiment(None, [f"model.kind={file}:GatedConv"]).own_kinds


def test_present_kind_of_a_stored_one_has_the_same_path(tmp_path, forget):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lion.py").write_text(f"{LION}# {folder}\n")
    kinds = [
        load_experiment(None, [f"optim.kind={tmp_path}/{folder}/lion.py:lion"]).optim.kind
        for folder in ("a", "b", "c")
    ]
    for kind in kinds:
        assert present("optim", f"{kind[:-32]}{'0' * 32}") == kind
    assert present("optim", f"moved/lion.py:lion@{'0' * 32}") in kinds
    with pytest.raises(UserError, match="two trials; choose another name, for a trial or for a fi"):
        load_sweep(None, [f"sweep.grid.optim.kind=[{kinds[0]}, {kinds[1]}]"])


def test_present_kind_is_the_edited_file_and_not_a_loaded_copy(tmp_path, forget):
    file = tmp_path / "lion.py"
    file.write_text(LION)
    word = f"optim.kind={file}:lion"
    before = load_experiment(None, [word]).optim.kind
    store(tmp_path / "run" / "code", [before])
    forget()
    load_copies({"optim": {"kind": before}}, tmp_path / "run")
    assert present("optim", before) == before
    file.write_text(f"{LION}# edited\n")
    edited = load_experiment(None, [word]).optim.kind
    assert edited != before
    assert present("optim", before) == edited
    load_copies({"optim": {"kind": before}}, tmp_path / "run")
    file.write_text(LION)
    load_experiment(None, [word])
    assert present("optim", edited) == before  # edited back


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "big.py").write_bytes(b"#" * (1 << 21))
    for name, message in (
        ("none.py", "cannot be read (No such file or directory)"),
        ("pipe.py", "expected a plain file"),
        ("folder.py", "expected a plain file"),
        ("big.py", "more than 1,048,576 bytes"),
    ):
        assert message in refusal("model.kind", tmp_path / name, "Model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.widht=8"], "model.widht: no such field; did you mean model.width?"),
        (["model.n_head=8"], "model.n_head: no such field; only model.kind=gpt2 or modern has it"),
        (["model.width=a"], 'model.width: "a" is not an integer'),
        (["model.width=null"], "model.width: null is not an integer"),
        (["model.kernel=99"], "model.kernel=99 is above block_size=64"),
        (["optim.kind=lion.py"], 'optim.kind: "lion.py" is not adamw | muon | FILE.py:FACTORY'),
    ],
)
def test_field_of_a_model_is_checked_like_any_other(words, message):
    with pytest.raises(UserError) as refused:
        load_experiment(None, [f"model.kind={HERE}/conv.py:GatedConv", *words])
    assert str(refused.value) == f"command line: {message}"


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        ("gpt2", "model.n_embb=8", "model.n_embb: no such field; did you mean model.n_embd?"),
        ("gpt2", "model.n_layer=a", 'model.n_layer: "a" is not an integer'),
        ("gpt2", "model.n_head=5", "model.n_head: 5 does not divide n_embd=768"),
        ("modern", "model.n_kv_haed=2", "did you mean model.n_kv_head?"),
        ("modern", "model.smear=2", "model.smear: 2 is not true or false"),
        ("modern", "model.n_kv_head=4", "model.n_head=6 must be divisible by n_kv_head=4"),
        ("modern", "model.width=8", "model.width: no such field"),
    ],
)
def test_fields_of_our_models_are_checked_in_the_same_way(kind, word, message):
    with pytest.raises(UserError) as refused:
        load_experiment(None, [f"model.kind={kind}", word])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hash_of_another_version_is_refused():
    with pytest.raises(UserError, match="leave out @0{32} to use the file as it is"):
        load_experiment(None, [f"model.kind={HERE}/conv.py:GatedConv@{'0' * 32}"])


def test_muon_refuses_a_model_without_groups(tmp_path):
    (tmp_path / "conv.py").write_text(edited(CONV, GROUPS, "    def groups(self):"))
    kind = f"model.kind={tmp_path}/conv.py:GatedConv"
    with pytest.raises(UserError, match="optim.kind=muon needs a model with `parameter_groups`"):
        load_experiment(None, [kind, "optim.kind=muon"])
    assert load_experiment(None, [kind, f"optim.kind={HERE}/lion.py:lion"])


def test_numbers_that_an_optimizer_keeps_are_counted():
    kind = load_experiment(None, [f"optim.kind={HERE}/lion.py:lion"]).optim.kind
    assert is_own(kind)
    assert OPTIMIZERS[kind].moments == dict.fromkeys(OPTIMIZERS["adamw"].moments, 1)


def test_proof_gives_an_optimizer_the_names_of_its_parameters(tmp_path):
    text = edited(
        LION,
        'parameter in group["params"]:',
        'parameter, _ in zip(group["params"], group["names"], strict=True):',
    )
    (tmp_path / "lion.py").write_text(text)
    experiment = load_experiment(
        None, [f"optim.kind={tmp_path}/lion.py:lion", "train.dtype=float32"]
    )
    model = _Tiny()
    for parameter in model.parameters():
        parameter.grad = parameter.detach().cos()
    optimizer = optim.build(experiment.optim.kind, model, SETTINGS)
    gradients = SimpleNamespace(device=torch.device("cpu"), clip=lambda max_norm: None)
    state = SimpleNamespace(
        optimizer=optimizer, gradients=gradients, step=0, optimizer_state=lambda parameter: {}
    )
    step = Step(experiment, state)
    assert len(step._updated_copies()) == len(optimizer.param_groups) == len(optim.GROUPS)
