"""No operator of the common layers and functions is unknown: forward, backward, optimizer steps, inference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profiler import Counter, count

TOKENS = (2, 5, 16)
IMAGE = (2, 4, 8, 8)
VOLUME = (2, 4, 4, 4, 4)

LAYERS = {
    "ReLU ReLU6 Hardtanh LeakyReLU PReLU RReLU Hardshrink Softshrink Tanhshrink Sigmoid Tanh SiLU Mish": TOKENS,
    "Softplus ELU SELU CELU LogSigmoid Hardsigmoid Hardswish GELU Softsign GLU": TOKENS,
    "Softmax(-1) LogSoftmax(-1) Softmin(-1) Dropout AlphaDropout": TOKENS,
    "Identity Flatten Softmax2d Dropout2d ChannelShuffle(2) PixelShuffle(2) PixelUnshuffle(2) Dropout3d": IMAGE,
    "Linear(16,8) Linear(16,8,bias=False) LayerNorm(16) RMSNorm(16) Threshold(0.1,0.0) Bilinear": TOKENS,
    "LSTM(16,8) LSTM(16,8,2,batch_first=True,bidirectional=True) GRU(16,8)": TOKENS,
    "RNN(16,8) RNN(16,8,nonlinearity='relu')": TOKENS,
    "LSTM(16,8,proj_size=4) TransformerEncoderLayer(16,2,32)": TOKENS,
    "TransformerEncoderLayer(16,2,32,activation='gelu')": TOKENS,
    "Conv1d(5,6,3) ConvTranspose1d(5,6,3) AvgPool1d(2) MaxPool1d(2) AdaptiveAvgPool1d(4) AdaptiveMaxPool1d(4)": TOKENS,
    "BatchNorm1d(5) InstanceNorm1d(5) ZeroPad1d(1) ReflectionPad1d(1) ReplicationPad1d(1) LPPool1d(2,2)": TOKENS,
    "Conv2d(4,6,3) Conv2d(4,4,3,groups=4) ConvTranspose2d(4,6,3,groups=2) BatchNorm2d(4) AdaptiveMaxPool2d(3)": IMAGE,
    "GroupNorm(2,4) AvgPool2d(2) MaxPool2d(2) AdaptiveAvgPool2d(3) AdaptiveAvgPool2d(1)": IMAGE,
    "InstanceNorm2d(4,affine=True)": IMAGE,
    "LPPool2d(2,2) FractionalMaxPool2d(2,output_size=3) Upsample(scale_factor=2)": IMAGE,
    "Upsample(scale_factor=2,mode='bilinear') Upsample(scale_factor=2,mode='bicubic')": IMAGE,
    "ReflectionPad2d(1) ReplicationPad2d(1) ConstantPad2d(1,0.5)": IMAGE,
    "Unfold(2) LocalResponseNorm(2) CircularPad2d(1) CosineSimilarity PairwiseDistance": IMAGE,
    "Conv3d(4,6,3) ConvTranspose3d(4,6,3) BatchNorm3d(4) MaxPool3d(2) AvgPool3d(2) AdaptiveAvgPool3d(2)": VOLUME,
    "Upsample(scale_factor=2,mode='trilinear') Fold((4,4),2)": VOLUME,
}
PAIRS = ("Bilinear", "CosineSimilarity", "PairwiseDistance")


def cases():
    for names, shape in LAYERS.items():
        for name in names.split():
            yield pytest.param(name, shape, id=name)


def layer(name):
    if name == "Bilinear":
        return nn.Bilinear(16, 16, 4)
    if name == "GLU":
        return nn.GLU(dim=-1)
    return eval(f"nn.{name}" if "(" in name else f"nn.{name}()", {"nn": nn})


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("name", "shape"), cases())
def test_layers(name, shape):
    if name == "Fold((4,4),2)":
        shape = (2, 16, 9)
    module = layer(name)
    given = torch.randn(shape, requires_grad=True)
    inputs = (given, torch.randn(shape)) if name in PAIRS else (given,)
    with Counter(module) as counter:
        first(module(*inputs)).sum().backward()
    assert not counter.counts().unknown
    module.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not count(module, *inputs)[1].unknown


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_under_autocast(dtype):
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 4))
    with Counter(module) as counter:
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(module(torch.randn(IMAGE)), torch.tensor([0, 1]))
        loss.backward()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.root.operators()["aten._to_copy"].bytes_read > 0


x = torch.randn(4, 6)
classes = torch.tensor([0, 1, 2, 3])
signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
LOSSES = {
    "cross_entropy": lambda p: F.cross_entropy(p, classes, label_smoothing=0.1, weight=torch.ones(6)),
    "cross_entropy_probabilities": lambda p: F.cross_entropy(p, x.softmax(-1)),
    "nll": lambda p: F.nll_loss(p.log_softmax(-1), classes, ignore_index=2),
    "mse": lambda p: F.mse_loss(p, x),
    "l1": lambda p: F.l1_loss(p, x, reduction="sum"),
    "smooth_l1": lambda p: F.smooth_l1_loss(p, x),
    "huber": lambda p: F.huber_loss(p, x),
    "bce": lambda p: F.binary_cross_entropy(p.sigmoid(), x.sigmoid()),
    "bce_logits": lambda p: F.binary_cross_entropy_with_logits(p, x.sigmoid(), pos_weight=torch.ones(6)),
    "kl": lambda p: F.kl_div(p.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "kl_log": lambda p: F.kl_div(p.log_softmax(-1), x.log_softmax(-1), log_target=True),
    "poisson": lambda p: F.poisson_nll_loss(p, x.abs(), full=True),
    "gaussian": lambda p: F.gaussian_nll_loss(p, x, torch.ones(4, 6)),
    "hinge": lambda p: F.hinge_embedding_loss(p, x.sign()),
    "margin": lambda p: F.multi_margin_loss(p, classes),
    "multilabel": lambda p: F.multilabel_soft_margin_loss(p, (x > 0).float()),
    "multilabel_margin": lambda p: F.multilabel_margin_loss(p, torch.zeros(4, 6, dtype=torch.long)),
    "soft_margin": lambda p: F.soft_margin_loss(p, x.sign()),
    "triplet": lambda p: F.triplet_margin_loss(p, x, x + 1),
    "cosine": lambda p: F.cosine_embedding_loss(p, x, signs),
    "ranking": lambda p: F.margin_ranking_loss(p[:, 0], x[:, 0], signs),
    "ctc": lambda p: F.ctc_loss(
        p[:, None].log_softmax(-1).expand(4, 2, 6),
        torch.ones(2, 2, dtype=torch.long),
        torch.tensor([4, 4]),
        torch.tensor([2, 2]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    logits = torch.randn(4, 6, requires_grad=True)
    with Counter() as counter:
        LOSSES[name](logits).backward()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.total("forward").flops > 0
    assert counts.total("backward").flops > 0


ids = torch.tensor([[1, 2, 3], [4, 5, 1]])
square = torch.randn(2, 3, 8, 8)
FUNCTIONS = {
    "embedding": lambda p: F.embedding(ids, p, padding_idx=0, max_norm=1.0),
    "embedding_sparse": lambda p: F.embedding(ids, p, sparse=True),
    **{f"bag_{mode}": (lambda p, mode=mode: F.embedding_bag(ids, p, mode=mode)) for mode in ("sum", "mean", "max")},
    "bag_weights": lambda p: F.embedding_bag(ids, p, per_sample_weights=torch.rand(2, 3), mode="sum"),
    "einsum": lambda p: torch.einsum("bi,bj->ij", p, p),
    "norms": lambda p: p.norm() + torch.linalg.vector_norm(p, dim=0).sum() + p.norm(p=1),
    "statistics": lambda p: p.var() + p.std(0).sum() + p.mean(1).sum() + torch.var_mean(p)[0] + p.logsumexp(0).sum(),
    "order": lambda p: (
        p.sort()[0].sum() + p.topk(2)[0].sum() + p.max() + p.amin() + p.cumsum(0).sum() + p.min(1)[0].sum()
    ),
    "indexing": lambda p: p[ids[0]] + p.gather(0, ids[:, :1]).sum() + p.index_select(0, ids[0]) + p[p > 0].sum(),
    "scattering": lambda p: torch.zeros_like(p).scatter_add(0, ids, p[:2, :3]).index_add(0, ids[0], p[:3]),
    "shapes": lambda p: torch.cat([p.roll(1), p.flip(0), p.tril().repeat(1, 1), torch.stack([p[0]])]).unfold(0, 2, 1),
    "views in place": lambda p: (p * 1).as_strided_((8, 7), (1, 8)).t_().unsqueeze_(0).squeeze_(0),
    "rotary": lambda p: torch.cat([-p[:, 4:], p[:, :4]], -1) * p.cos() + p.sin(),
    "math": lambda p: (p.abs() + 1).pow(0.3).log().exp().rsqrt().clamp(0, 1) + p.erf() + p.atan2(p) + p.square().sqrt(),
    "where": lambda p: torch.where(p > 0, p, 0.5).masked_fill(p < -1, 0.0).lerp(p, 0.1) + p.addcmul(p, p, value=0.5),
    "integers": lambda p: (
        p * ((torch.arange(8) // 2 % 3) << 1 & 1).cumsum(0) + p.argmax(-1)[:, None] + torch.bincount(ids[0])[:1]
    ),
    "grid": lambda p: F.grid_sample(p[None, None], torch.zeros(1, 3, 3, 2), align_corners=False),
    "normalize": lambda p: F.normalize(p) + F.layer_norm(p, (8,)) + F.rms_norm(p, (8,)) + F.softmax(p, -1),
    "products": lambda p: p @ p.T @ p[:, 0] + torch.dot(p[:, 0], p[:, 1]) + torch.addmv(p[:, 0], p, p[0]),
    "outer": lambda p: torch.addr(p, p[:, 0], p[0]) + torch.outer(p[:, 0], p[0]) + torch.cdist(p, p)[:, :1],
    "batches": lambda p: p[None].baddbmm(p[None, :, :2], p[None, :2]) + torch.addbmm(p, p[None, :, :2], p[None, :2]),
    "random": lambda p: (
        p + torch.rand_like(p) + torch.randn(7, 8) + torch.bernoulli(p.sigmoid()) + p.softmax(-1).multinomial(1)
    ),
    "gumbel": lambda p: F.gumbel_softmax(p),
    "item": lambda p: p * p.sum().item() if bool((p > -100).all()) else p,
    "vmap": lambda p: torch.vmap(lambda row: row.softmax(0) * 2)(p),
    "complex": lambda p: torch.view_as_real(torch.polar(p.abs(), p) * torch.complex(p, p)),
    "quantized": lambda p: torch.fake_quantize_per_tensor_affine(p, 0.1, 0, -8, 7),
    "spectral": lambda p: F.linear(p, nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)).weight),
    **{
        f"sdpa_{name}": (lambda p, o=options: F.scaled_dot_product_attention(square + p[0], square, square, **o))
        for name, options in {
            "plain": {},
            "causal": {"is_causal": True},
            "mask": {"attn_mask": torch.randn(8, 8)},
            "bool": {"attn_mask": torch.ones(8, 8).tril().bool()},
            "dropout": {"dropout_p": 0.1},
        }.items()
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    given = torch.randn(7, 8, requires_grad=True)
    with Counter() as counter:
        FUNCTIONS[name](given).sum().backward()
    assert not counter.counts().unknown
    with torch.inference_mode():
        assert not count(FUNCTIONS[name], given)[1].unknown


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"lr": 1e-3},
    **{
        name: {"lr": 0.1}
        for name in ("Adagrad", "Adadelta", "RMSprop", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "Adafactor")
    },
}


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=["for", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, how):
    if "fused" in how and name not in ("SGD", "Adam", "AdamW", "Adagrad"):
        pytest.skip("torch fuses no step of this optimizer")
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = getattr(torch.optim, name)(module.parameters(), **OPTIMIZERS[name], **how)
    for _ in range(2):
        module(torch.randn(3, 4)).sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        with Counter(module) as counter:
            optimizer.step()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.total("step").flops > 0
    assert counts.total() == counts.total("step")


def test_unknown_operators_are_listed_with_their_calls_and_bytes():
    matrix = torch.eye(3)
    _, counts = count(lambda: (torch.linalg.eigh(matrix), torch.linalg.eigh(matrix)))
    assert counts.unknown == {"aten._linalg_eigh": 2}
    assert counts.total().flops == 0
    assert counts.root.operators()["aten._linalg_eigh"].bytes_read == 2 * 9 * 4
