"""Where calls are cut does not change what they draw, or the window is refused."""

from itertools import pairwise

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, run_window
from tbptt_ckpt.errors import ReplayMismatchError

WIDTH_IN, WIDTH, LANES, STEPS = 3, 4, 2, 12


class Own(nn.Module):
    """A segment module with what is given between its input and its output."""

    def __init__(self, layer, before=None, after=None):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(WIDTH, WIDTH)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x, state):
        h, state = self.layer(self.before(x), state)
        return self.out(self.after(h)), state


def layer(kind, num_layers, dropout, **options):
    return kind(WIDTH_IN, WIDTH, num_layers=num_layers, dropout=dropout, **options)


DEPEND = {  # on where they are cut
    "LSTM": lambda: layer(nn.LSTM, 3, 0.5),
    "GRU": lambda: layer(nn.GRU, 3, 0.5),
    "RNN, batch first": lambda: layer(nn.RNN, 3, 0.5, batch_first=True),
    "LSTM inside": lambda: Own(layer(nn.LSTM, 3, 0.5)),
    "two dropouts": lambda: Own(nn.LSTM(WIDTH_IN, WIDTH), nn.Dropout(0.5), nn.Dropout(0.5)),
    "outputs only": lambda: Own(
        nn.GRU(WIDTH_IN, WIDTH), None, nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    ),
}
FREE = {
    "two layers": lambda: layer(nn.LSTM, 2, 0.5),
    "one dropout": lambda: Own(nn.LSTM(WIDTH_IN, WIDTH), nn.Dropout(0.5)),
    "eval": lambda: layer(nn.LSTM, 3, 0.5).eval(),
    "no dropout": lambda: layer(nn.LSTM, 3, 0.0),
}


def data(module, dtype=torch.float64):
    """Inputs whose first feature is the step."""
    inputs = torch.randn(STEPS, LANES, WIDTH_IN, dtype=dtype)
    inputs[..., 0] = torch.arange(STEPS)[:, None]
    targets = torch.randn(STEPS, LANES, WIDTH, dtype=dtype)
    if getattr(module, "batch_first", False):
        inputs, targets = inputs.transpose(0, 1), targets.transpose(0, 1)
    return inputs, targets


def new(make):
    torch.manual_seed(0)
    module = make().double()
    return module, *data(module)


def first_calls(module, calls):
    """Note the steps of each call."""
    dim = int(getattr(module, "batch_first", False))

    def note(_, given):
        steps = given[0].select(1 - dim, 0)[..., 0]
        calls.append((int(steps[0]), int(steps[-1]) + 1))

    return module.register_forward_pre_hook(note)


def plain(make, k1, k2, calls):
    """Plain BPTT over the calls in which each step was new."""
    module, inputs, targets = new(make)
    dim, edges, generators, states = int(getattr(module, "batch_first", False)), [0], {}, {0: None}

    def run(state, start, stop):
        outputs = []
        for begin, end in pairwise(edges):
            if start <= begin < stop:
                generators.setdefault(begin, torch.get_rng_state())
                output, state = module(inputs.narrow(dim, begin, end - begin), state)
                outputs.append(output)
        return torch.cat(outputs, dim), state

    for begin, end in calls:
        if begin == edges[-1]:
            edges.append(end)
    torch.manual_seed(1)
    for begin, end in pairwise(edges):
        with torch.no_grad():
            states[end] = run(states[begin], begin, end)[1]
    for stop in range(k1, STEPS + k1, k1):
        stop, new_start = min(stop, STEPS), stop - k1
        start = max(0, stop - k2)
        torch.set_rng_state(generators[start])
        output, _ = run(states[start], start, stop)
        wanted = targets.narrow(dim, new_start, stop - new_start)
        found = output.narrow(dim, new_start - start, stop - new_start)
        F.mse_loss(found, wanted).backward()
    return [p.grad for p in module.parameters()]


def trained(make, k1, k2, **options):
    """The gradients of all windows, and the calls that were made; None where it was refused."""
    module, inputs, targets = new(make)
    calls = []
    per_step = None if isinstance(module, nn.RNNBase) else False
    time_dim = int(getattr(module, "batch_first", False))
    engine = TBPTT(module, F.mse_loss, k1, k2, None, per_step=per_step, **options)
    torch.manual_seed(1)
    with first_calls(module, calls):
        try:
            engine.train(TensorSequence(inputs, targets, time_dim=time_dim))
        except ReplayMismatchError as error:
            if "where its calls are cut" not in str(error):
                raise
            return None, calls
    return [p.grad for p in module.parameters()], calls


def check(make, k1, k2, **options):
    """Whether it trained, and then rightly."""
    found, calls = trained(make, k1, k2, **options)
    if found is None:
        return False
    torch.testing.assert_close(found, plain(make, k1, k2, calls), rtol=1e-9, atol=1e-12)
    return True


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in DEPEND),
        ("LSTM inside", {"executor": "checkpoint"}),
        ("LSTM inside", {"check_replays": False}),
    ],
)
def test_calls_that_are_cut_differently_are_refused(name, options):
    ran = {
        (strategy, k1, k2): check(DEPEND[name], k1, k2, strategy=strategy, **options)
        for strategy in ("retain", "uniform:2", "uniform:3", "revolve:1")
        for k1, k2 in ((12, 12), (4, 8))
    }
    assert ran["retain", 12, 12]
    assert ran["retain", 4, 8]
    assert ran["uniform:2", 4, 8]
    assert not ran["uniform:3", 4, 8]
    assert ran["revolve:1", 12, 12] == ("executor" in options)  # a tree advances leaf by leaf


@pytest.mark.parametrize(("strategy", "k1"), [("retain", 3), ("retain", 5), ("uniform:2", 4)])
@pytest.mark.parametrize("overlap", cases.OVERLAPS)
def test_what_the_error_names_works(strategy, k1, overlap):
    for k2 in (k1, 2 * k1, 3 * k1):
        assert check(DEPEND["LSTM inside"], k1, k2, strategy=strategy, overlap=overlap)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*DEPEND, *FREE])
@pytest.mark.parametrize("overlap", cases.OVERLAPS)
@pytest.mark.parametrize("executor", cases.EXECUTORS)
def test_every_window_is_right_or_refused(name, overlap, executor):
    for k1 in (1, 3, 4, 5):
        for k2 in (k1, k1 + 1, 2 * k1, 11):
            for strategy in cases.STRATEGIES:
                done = check(
                    {**DEPEND, **FREE}[name],
                    k1,
                    k2,
                    strategy=strategy,
                    overlap=overlap,
                    executor=executor,
                )
                assert done or name in DEPEND


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("strategy", ["uniform:3", "revolve:1", "sqrt"])
def test_what_draws_alike_wherever_it_is_cut_is_not_refused(name, strategy):
    assert check(FREE[name], 4, 8, strategy=strategy)


class Mixing(nn.Module):
    """A segment module that lets the steps of a call see each other outside of the state."""

    def __init__(self, mix, *, before=False):
        super().__init__()
        self.layer, self.mix, self.before = nn.GRU(WIDTH_IN, WIDTH), mix, before

    def forward(self, x, state):
        output, state = self.layer(self.mix(x) if self.before else x, state)
        return output if self.before else self.mix(output), state


class Over(nn.Module):
    """A layer over the steps of a call, which it wants elsewhere."""

    def __init__(self, layer, to, back):
        super().__init__()
        self.layer, self.to, self.back = layer, to, back

    def forward(self, x):
        return self.back(self.layer(self.to(x)), x)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Formula(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


MIXING = {
    "mean": lambda: Mixing(Formula(lambda y: y - y.mean(0))),
    "first step": lambda: Mixing(Formula(lambda x: x + x[:1]), before=True),
    "attention": lambda: Mixing(Attention(WIDTH, 1)),
    "norm over steps": lambda: Mixing(
        Over(nn.BatchNorm1d(WIDTH_IN), lambda x: x.flatten(0, 1), lambda y, x: y.view_as(x)),
        before=True,
    ),
    "padded convolution": lambda: Mixing(
        Over(
            nn.Conv1d(WIDTH_IN, WIDTH_IN, 3, padding=1),
            lambda x: x.permute(1, 2, 0),
            lambda y, _: y.permute(2, 0, 1),
        ),
        before=True,
    ),
}
WITHIN_STEPS = {
    "norm of each step": lambda: Mixing(nn.LayerNorm(WIDTH)),
    "convolution over features": lambda: Mixing(nn.Conv1d(LANES, LANES, 3, padding=1)),
    "lanes see each other": lambda: Mixing(Formula(lambda y: y - y.mean(1, keepdim=True))),
}


@pytest.mark.parametrize("executor", cases.EXECUTORS)
@pytest.mark.parametrize("strategy", ["uniform:4", "step", "sqrt"])
@pytest.mark.parametrize("name", [*MIXING, *WITHIN_STEPS])
def test_calls_that_mix_their_steps_are_refused(name, strategy, executor):
    module, inputs, targets = new((MIXING | WITHIN_STEPS)[name])
    weights = list(module.parameters())
    engine = TBPTT(
        module, F.mse_loss, 6, 12, None, per_step=False, strategy=strategy, executor=executor
    )
    sequence = TensorSequence(inputs, targets)
    if name in MIXING:
        with pytest.raises(ReplayMismatchError, match="gives steps other values where its calls"):
            engine.train(sequence)
        assert all(weight.grad is None for weight in weights)
        return
    engine.train(sequence)
    found, module = [weight.grad for weight in weights], new(WITHIN_STEPS[name])[0]
    TBPTT(module, F.mse_loss, 6, 12, None, per_step=False, strategy="retain").train(sequence)
    expected = [weight.grad for weight in module.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


class InnerOverSegments(nn.Module):
    """Takes an inner gradient through the history of the state, which one graph has whole."""

    def __init__(self):
        super().__init__()
        self.layer, self.fast = nn.GRU(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, state):
        outputs = []
        for step in x:
            _, state = self.layer(step[None], state)
            with torch.enable_grad():
                error = torch.tanh(self.fast(state)).square().sum()
                (grad,) = torch.autograd.grad(error, self.fast.weight, create_graph=True)
            state = state - F.linear(state, 0.1 * grad)
            outputs.append(state[0])
        return torch.stack(outputs), state


def test_one_graph_is_not_taken_for_one_that_is_cut():
    module, inputs, targets = new(InnerOverSegments)
    run = (module, F.mse_loss, inputs[:5], targets[:5], torch.randn(1, LANES, WIDTH).double())
    found = {}
    for strategy in ("retain", "uniform:2"):
        module.zero_grad()
        run_window(*run, per_step=False, strategy=strategy, executor="checkpoint")
        found[strategy] = [weight.grad.clone() for weight in module.parameters()]
    torch.testing.assert_close(found["uniform:2"], found["retain"], rtol=1e-9, atol=1e-12)
    with pytest.raises(ReplayMismatchError, match="how far back the graph"):
        run_window(*run, per_step=False, strategy="uniform:2")


def test_a_window_that_is_refused_leaves_weights_and_generators():
    module, inputs, targets = new(DEPEND["LSTM"])
    before = [p.clone() for p in module.parameters()]
    engine = TBPTT(
        module, F.mse_loss, 12, 12, torch.optim.SGD(module.parameters(), 1.0), strategy="revolve:1"
    )
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    with pytest.raises(ReplayMismatchError, match="'uniform:L' for an L"):
        engine.train(TensorSequence(inputs, targets))
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(list(module.parameters()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())


def test_the_remedy_of_one_step_works_with_every_strategy():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([nn.GRUCell(WIDTH_IN, WIDTH), nn.GRUCell(WIDTH, WIDTH)])
            self.drops = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])

        def forward(self, x, state):
            state = state or (None, None)
            states = []
            for cell, drop, h in zip(self.cells, self.drops, state, strict=True):
                states.append(cell(x, h))
                x = drop(states[-1])
            return x, tuple(states)

    def gradients(strategy):
        module, inputs, targets = new(Stack)
        torch.manual_seed(1)
        TBPTT(module, F.mse_loss, 4, 8, None, strategy=strategy).train(
            TensorSequence(inputs, targets)
        )
        return [p.grad for p in module.parameters()]

    expected = gradients("retain")
    for strategy in cases.STRATEGIES:
        found = gradients(strategy)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
