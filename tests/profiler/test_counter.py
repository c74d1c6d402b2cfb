"""``Counter``: whose work it is and in which phase, what it leaves behind (nothing), and what it refuses."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from ops import costs
from profiler import PHASES, Counter, Counts, ProfilerError, Work, count


class Net(nn.Module):
    """Two blocks in a list, a loss of functions outside of any submodule."""

    def __init__(self, recompute=None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.recompute = recompute

    def forward(self, x):
        for block in self.blocks:
            if self.recompute is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
        return self.head(x)


def train(model, steps=1, optimizer=None):
    torch.manual_seed(0)
    for _ in range(steps):
        loss = F.mse_loss(model(torch.randn(3, 4, requires_grad=True)), torch.zeros(3, 2))
        loss.backward()
    if optimizer:
        optimizer.step()
    return loss


def counted(model, *args, **kwargs):
    with Counter(model) as counter:
        train(model, *args, **kwargs)
    return counter.counts()


ONE = 2 * 3 * 4 * 4  # of a block's linear layer


# ---- whose, and when ----


def test_the_tree_has_every_module_by_its_name():
    model = Net()
    counts = counted(model)
    names = [module.name for module in counts.root.walk()]
    assert names == ["", "Net", *(name for name, _ in model.named_modules() if name)]
    assert counts.module("blocks").kind == "ModuleList"
    assert counts.module("blocks.0.0").parameters == 20
    assert counts.module("Net").total_parameters == sum(p.numel() for p in model.parameters())
    assert counts.module("blocks.1").calls == {"forward": 1}
    with pytest.raises(ProfilerError, match=r"no module 'block.0' was counted: did you mean 'blocks.0'"):
        counts.module("block.0")


def test_forward_and_backward_belong_to_the_same_module():
    counts = counted(Net())
    for name in ("blocks.0.0", "blocks.1.0"):
        assert counts.module(name).own["forward"]["aten.addmm"].flops == ONE
        assert counts.module(name).own["backward"]["aten.mm"].flops == 2 * ONE
    assert counts.module("blocks.0.1").own["backward"]["aten.tanh_backward"].flops == 3 * 12
    assert counts.module("Net").own["forward"]["aten.add"].flops == 24  # residual sums, in the model's own forward
    assert counts.root.own["forward"]["aten.mse_loss"].flops == 3 * 6 + 1  # between modules
    assert counts.root.own["backward"]["aten.mse_loss_backward"].flops == 3 * 6
    assert counts.module("blocks").own_work() == Work()
    assert counts.module("blocks").total("forward").flops == 2 * (ONE + 12)


def test_totals_are_sums_of_what_modules_did_themselves():
    model = Net("plain")
    counts = counted(model, optimizer=torch.optim.Adam(model.parameters()))
    assert counts.total() == sum((counts.total(phase) for phase in PHASES), Work())
    assert counts.total() == sum(counts.root.operators().values(), Work())
    assert counts.total("step").flops > 0


@pytest.mark.parametrize("kind", ["reentrant", "plain"])
def test_recomputation_is_apart(kind):
    plain, again = counted(Net()), counted(Net(kind))
    for name in ("blocks.0.0", "blocks.1.0"):
        module = again.module(name)
        assert module.own["recompute"]["aten.addmm"] == module.own["forward"]["aten.addmm"]
        assert module.calls == {"forward": 1, "recompute": 1}
        assert module.own["backward"]["aten.mm"] == plain.module(name).own["backward"]["aten.mm"]
    assert "recompute" not in again.module("head").own
    assert again.total("forward").flops == plain.total("forward").flops
    assert again.total("backward").flops == plain.total("backward").flops
    assert plain.total("recompute") == Work()


def test_functions_that_are_computed_again_belong_to_their_module():
    class Functional(nn.Module):
        def forward(self, x):
            return checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=False)

    with Counter() as counter:
        Functional()(torch.randn(4, 4, requires_grad=True)).sum().backward()
    own = counter.counts().module("Functional").own
    assert own["recompute"]["aten.mm"].flops == own["forward"]["aten.mm"].flops == 128
    assert own["backward"]["aten.mm"].flops == 256


def test_micro_batches_add_up():
    one, three = counted(Net()), counted(Net(), steps=3)
    assert three.total("forward").flops == 3 * one.total("forward").flops
    assert three.module("head").calls == {"forward": 3}
    assert three.module("head").parameters == one.module("head").parameters
    # Gradients are added to those of the micro-batches before.
    added = sum(p.numel() for p in Net().parameters())
    assert three.total("backward").flops == 3 * one.total("backward").flops + 2 * added
    assert three.module("head").own["backward"]["aten.add_"].flops == 2 * 10


def test_a_module_called_twice_counts_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = nn.Sequential(self.one)

        def forward(self, x):
            return self.other(self.one(self.one(x)))

    with Counter(model := Twice()) as counter:
        model(torch.randn(3, 4)).sum().backward()
    counts = counter.counts()
    assert counts.module("one").calls == {"forward": 2}
    assert counts.module("one").total("forward").flops == 2 * ONE
    assert counts.module("other.0").total("forward").flops == ONE  # under the name it was called by
    assert counts.module("other.0").total("backward").macs == ONE
    assert counts.module("Twice").total_parameters == 20
    assert counts.module("other.0").parameters == 0


def test_shared_weights_count_once_and_their_work_each_time():
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    _, counts = count(model, torch.tensor([1, 2]))
    assert counts.root.total_parameters == 28
    assert counts.root.total_parameter_bytes == 112
    assert counts.module("1").total().flops == 2 * 2 * 4 * 7


def test_optimizers_steps_are_apart_and_closures_are_not_steps():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    x = torch.randn(3, 4)

    def closure():
        loss = model(x).square().sum()
        loss.backward()
        return loss

    with Counter(model) as counter:
        optimizer.step(closure)
    counts = counter.counts()
    assert counts.module("Linear").total("forward").macs == 3 * 8 * counts.module("Linear").calls["forward"]
    assert counts.total("backward").flops > 0
    assert counts.root.own_work("step").flops > 0


def test_what_belongs_to_a_step_can_be_said():
    model = Net()
    train(model)
    with Counter(model) as counter, counter.optimizer_step():
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert counter.counts().total() == counter.counts().total("step") != Work()


def test_several_models_and_loose_functions():
    with Counter() as counter:
        x = nn.Linear(4, 4)(torch.randn(3, 4))
        nn.Linear(4, 2)(x * x)
    counts = counter.counts()
    assert [child.name for child in counts.root.children] == ["Linear", "Linear#2"]
    assert counts.root.own["forward"]["aten.mul"].flops == 12


def test_a_forward_that_is_not_called_as_a_module_belongs_to_its_caller():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner.forward(x)

    _, counts = count(Caller(), torch.randn(3, 4))
    assert counts.module("Caller").own_work().flops == ONE
    assert counts.module("inner").calls == {}


def test_lazy_modules_have_their_parameters():
    _, counts = count(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))
    assert counts.module("0").parameters == 15


def test_gradients_of_gradients_are_backward():
    x = torch.randn(3, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    with Counter(model) as counter:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    counts = counter.counts()
    assert counts.total("recompute") == Work()
    assert counts.total("backward").macs > 2 * counts.total("forward").macs


def test_functional_transforms():
    weight = torch.randn(4, 4)
    _, counts = count(torch.func.grad(lambda x: (weight @ x).sum()), torch.randn(4))
    assert counts.total("forward").macs == 16
    _, counts = count(torch.vmap(lambda x: weight @ x), torch.randn(3, 4))
    assert counts.total("forward").macs == 3 * 16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_work_is_the_same(mode):
    model, x = Net(), torch.randn(3, 4)
    _, expected = count(model, x)
    with mode():
        _, found = count(model, x)
    assert found.total().flops == expected.total().flops
    assert found.total().macs == expected.total().macs
    assert found.module("blocks.1.0").total().flops == ONE


def test_meta_tensors_are_counted_like_real_ones():
    _, expected = count(Net(), torch.randn(3, 4))
    _, found = count(Net().to("meta"), torch.randn(3, 4, device="meta"))
    assert found.total() == expected.total()


def test_jagged_tensors_count_their_parts():
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)], layout=torch.jagged)
    _, counts = count(nn.Linear(4, 3), x)
    assert counts.total().macs == 7 * 12


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_tensors_count_their_parts_and_collectives_are_known(one_process):
    mesh = init_device_mesh("cpu", (1,))
    left, right = (distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]) for _ in range(2))
    with Counter() as counter:
        left @ right + 1
        dist.all_reduce(torch.ones(3))
    counts = counter.counts()
    assert not counts.unknown
    assert (counts.total().macs, counts.total().flops) == (64, 128 + 16)
    assert counts.root.operators()["c10d.allreduce_"].bytes_read == 12


def test_a_replicated_model_counts_as_itself(one_process):
    model = nn.parallel.DistributedDataParallel(Net())
    with Counter(model.module) as counter:
        train(model)
    counts, alone = counter.counts(), counted(Net())
    assert counts.total("forward").flops == alone.total("forward").flops
    assert counts.root.total_parameters == alone.root.total_parameters
    assert counts.total("backward").macs == alone.total("backward").macs


# ---- activations ----


def test_activations_are_what_the_backward_pass_will_use():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with Counter(model) as counter:
        loss = model(x).sum()
        loss.backward()
    counts = counter.counts()
    assert counts.module("0").activation_bytes == 0  # the tanh keeps its result, not what it was given
    assert counts.module("1").activation_bytes == 3 * 8 * 4
    assert (
        counts.root.total_activation_bytes == 3 * 8 * 4 + 2 * loss.nbytes
    )  # the loss, and the 1 its backward begins with


@pytest.mark.parametrize("kind", ["reentrant", "plain"])
def test_checkpointed_modules_keep_nothing(kind):
    kept, again = counted(Net()), counted(Net(kind))
    assert kept.module("blocks.0.1").activation_bytes == 3 * 4 * 4
    assert again.module("blocks.0.1").activation_bytes == 0


def test_activations_of_micro_batches_are_those_of_the_largest():
    model = nn.Linear(4, 2)
    batches = [torch.randn(rows, 4) for rows in (2, 5, 3)]
    with Counter(model) as counter:
        for batch in batches:
            model(batch).exp().sum().backward()
    assert counter.counts().root.total_activation_bytes == 5 * 2 * 4 + 2 * 4


def test_without_gradients_activations_are_what_one_call_leaves():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4)
    with torch.no_grad(), Counter(model) as counter:
        kept = [model(x) for _ in range(3)]
    assert counter.counts().root.total_activation_bytes == kept[0].nbytes


# ---- what is left behind ----


def global_hooks():
    names = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_forward_hooks_always_called")
    optimizers = importlib.import_module("torch.optim.optimizer")
    steps = (optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks)
    return [*(getattr(hooks, name) for name in names), *steps]


def clean():
    stance = torch._dynamo.eval_frame._stance.stance
    return not any(global_hooks()) and not _get_current_dispatch_mode_stack() and costs._listener is None, stance


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


@pytest.mark.parametrize("where", ["forward", "backward", "step", "none"])
def test_nothing_is_left_behind(where):
    model = Net().eval()
    model.head.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if where == "forward":
        model.blocks[1][1] = Broken()
    elif where == "backward":
        model.head.weight.register_hook(lambda gradient: 1 / 0)
    elif where == "step":
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    modes = [module.training for module in model.modules()]
    try:
        counted(model, optimizer=optimizer)
    except (RuntimeError, ZeroDivisionError):
        assert where != "none"
    else:
        assert where == "none"
    assert clean() == (True, "default")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    healthy = Net()
    assert counted(healthy).total() == counted(copy.deepcopy(healthy)).total()


def test_an_exception_that_the_model_catches_leaves_the_place_right():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Sequential(Broken()), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x) + 1

    _, counts = count(Tries(), torch.randn(3, 4))
    assert counts.module("good").total().flops == ONE
    assert counts.module("Tries").own_work().flops == 12


@pytest.mark.parametrize("kind", [None, "reentrant", "plain"])
def test_results_are_the_same_bit_for_bit(kind):
    def run(counting):
        torch.manual_seed(3)
        model = Net(kind)
        model.blocks.append(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        optimizer = torch.optim.AdamW(model.parameters())
        if counting:
            with Counter(model):
                loss = train(model, 2, optimizer)
        else:
            loss = train(model, 2, optimizer)
        return [loss, *model.parameters(), *(p.grad for p in model.parameters()), torch.get_rng_state()]

    for plain, found in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, found)


def test_counting_goes_on_where_it_was_left():
    model, x = Net(), torch.randn(3, 4)
    counter = Counter(model)
    with counter:
        model(x)
    model(x)
    with counter:
        model(x)
    assert counter.counts().module("Net").calls == {"forward": 2}


# ---- compiled code, CUDA graphs, a second counter ----


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_are_counted_as_they_were_written(warm, fullgraph):
    torch._dynamo.reset()
    model, x = Net(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    if warm:
        compiled(x)
    with Counter(model) as counter:
        train(compiled)
    counts = counter.counts()
    assert counts.to_dict() == counted(Net()).to_dict()
    assert count(compiled, x)[1].module("blocks.1.0").total().flops == ONE
    torch._dynamo.reset()


def test_graphed_callables_are_refused():
    model = nn.Linear(2, 2)

    def forward(x):
        return x

    forward.__module__ = "torch.cuda.graphs"
    model.forward = forward
    with pytest.raises(ProfilerError, match=r"Linear replays a CUDA graph.*before make_graphed_callables"):
        count(model, torch.zeros(1, 2))
    assert clean()[0]


def test_one_counter_at_a_time():
    with Counter(), pytest.raises(ProfilerError, match="a counter runs already"), Counter():
        pass
    assert clean()[0]


# ---- the data ----


def test_counts_go_through_json():
    counts = counted(Net("plain"))
    assert Counts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts


def test_counts_are_frozen():
    with pytest.raises(AttributeError):
        counted(Net()).root.name = "other"
