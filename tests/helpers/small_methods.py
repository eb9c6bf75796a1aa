"""Small configurations of every method, for comparison with a literal computation."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from mixed_batches import MixedBatch, mixer_of
from torch import Tensor, nn

from inbatch.batch import MIXED, BankGroups, Batch, Rows, split_state
from inbatch.context.attention import BA2M, BatchFormer
from inbatch.context.curation import Curator
from inbatch.context.fusion import FUSIONS, Fusion
from inbatch.context.negatives import DropSimilar
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.models.network import Network, make_target_network
from inbatch.models.recompute import blocks
from inbatch.models.sync_batchnorm import synchronise_norm
from inbatch.nn.memory_bank import MemoryBank
from inbatch.nn.negatives import Negatives
from inbatch.rng import fold, permutation
from inbatch.runtime import distributed, sharding
from inbatch.training import grad_cache
from inbatch.training.optim import build_optimizer, parameter_groups
from inbatch.training.step import Step

SMALL: dict[str, dict[str, object]] = {
    "simclr": {"out_dim": 8},
    "dcl": {"out_dim": 8},
    "hcl": {"out_dim": 8},
    "moco": {"out_dim": 8, "queue_size": 40, "momentum": 0.9},
    "mocov3": {"hidden_dim": 8, "out_dim": 8, "momentum": 0.9},
    "nnclr": {"hidden_dim": 8, "pred_hidden_dim": 8, "out_dim": 8, "queue_size": 40},
    "byol": {"hidden_dim": 8, "out_dim": 8, "momentum": 0.9},
    "simsiam": {"hidden_dim": 8, "bottleneck_dim": 6, "out_dim": 8},
    "swav": {
        "num_prototypes": 6,
        "freeze_prototypes_epochs": 0,
        "queue_size": 16,
        "queue_start_epoch": 0,
        "hidden_dim": 8,
        "out_dim": 8,
    },
    "dino": {"num_prototypes": 6, "freeze_prototypes_epochs": 0, "momentum": 0.9, "hidden_dim": 8, "bottleneck_dim": 8},
    "cc": {"num_clusters": 3, "out_dim": 8},
    "pcl": {
        "num_clusters": (4, 6),
        "negatives": 3,
        "warmup_epochs": 0,
        "queue_size": 40,
        "momentum": 0.9,
        "out_dim": 8,
    },
    "barlow": {"hidden_dim": 8, "out_dim": 8},
    "vicreg": {"hidden_dim": 8, "out_dim": 8},
    "lejepa": {"hidden_dim": 8, "out_dim": 8, "slices": 6, "layers": 2},
    "visreg": {"hidden_dim": 8, "out_dim": 8, "slices": 6, "layers": 2},
    "wmse": {"hidden_dim": 8, "out_dim": 2, "w_size": 4},
    "relation": {"queue_size": 40},
    "sogclr": {"out_dim": 8},
    "isogclr": {"out_dim": 8, "eta": 0.03},
    "align_uniform": {"out_dim": 8},
    "tico": {"hidden_dim": 8, "out_dim": 8},
    "mmcr": {"hidden_dim": 8, "layers": 2, "out_dim": 8},
    "sigmoid": {"out_dim": 8, "layers": 2},
    "supcon": {"out_dim": 8},
    "supervised": {"num_classes": 3},
}
"""Options that make a registered method small; a method that is not listed is built with its defaults."""


def small_settings(method: Any) -> dict[str, Any]:
    """Return the settings of a small run: of a registered method its options, and a teacher if it needs one."""
    if method not in METHODS:
        return {}
    options = {f"method.{k}": v for k, v in SMALL.get(method, {}).items() if k != "num_classes"}
    return options | ({"teacher": "inbatch/cifar10-fast"} if METHODS[method].teacher else {})


VARIANTS = {name: (name, SMALL.get(name, {})) for name in METHODS} | {
    "moco-symmetric": ("moco", SMALL["moco"] | {"symmetric": True, "layers": 2, "hidden_dim": 8}),
    "moco-smooth": ("moco", SMALL["moco"] | {"smooth": 0.2, "neighbours": 3}),
    "simclr-3": ("simclr", SMALL["simclr"]),
    "mocov3-3": ("mocov3", SMALL["mocov3"] | {"layers": 3, "last_norm": True}),
    "nnclr-3": ("nnclr", SMALL["nnclr"] | {"contrast": "nt_xent"}),
    "byol-3": ("byol", SMALL["byol"] | {"scale": "cosine", "norm": True}),
    "byol-bare": ("byol", SMALL["byol"] | {"predictor": False}),
    "fastsiam": ("simsiam", SMALL["simsiam"] | {"targets": "mean"}),
    "simsiam-bare": ("simsiam", SMALL["simsiam"] | {"predictor": False, "stop_gradient": False}),
    "hcl-3": ("hcl", SMALL["hcl"] | {"beta": 0.0}),
    "dclw": ("dcl", SMALL["dcl"] | {"weighted": True}),
    "dcl-3": ("dcl", SMALL["dcl"] | {"weighted": True, "symmetric": False, "detach": True}),
    "swav-4": ("swav", SMALL["swav"] | {"queue_size": 0}),
    "swav-plain": ("swav", SMALL["swav"] | {"queue_size": 0}),
    "swav-frozen": ("swav", SMALL["swav"] | {"freeze_prototypes_epochs": 1}),
    "swav-joined": ("swav", SMALL["swav"]),
    "dino-4": ("dino", SMALL["dino"] | {"freeze_prototypes_epochs": 1, "layers": 2, "norm": True}),
    "dino-koleo": ("dino", SMALL["dino"] | {"koleo_weight": 0.1}),
    "lejepa-4": ("lejepa", SMALL["lejepa"] | {"samples": "all", "global_views": 2, "weights": "sum"}),
    "barlow-3": ("barlow", SMALL["barlow"] | {"scale": 0.1, "layers": 2}),
    "vicreg-3": ("vicreg", SMALL["vicreg"] | {"variance": "sum"}),
    "vicreg-bare": ("vicreg", SMALL["vicreg"] | {"std_coeff": 0.0}),
    "wmse-4": ("wmse", SMALL["wmse"] | {"w_iter": 2, "eps": 0.01, "norm": False}),
    "cc-3": ("cc", SMALL["cc"]),
    "pcl-late": ("pcl", SMALL["pcl"] | {"warmup_epochs": 1, "layers": 2}),
    "simclr-joined": ("simclr", SMALL["simclr"]),
    "relation-own": (
        "relation",
        SMALL["relation"] | {"candidates": "own", "teacher_temperature": 0.1, "center": False},
    ),
    "sogclr-epoch": ("sogclr", SMALL["sogclr"] | {"first": "epoch", "gamma": 0.5}),
    "tico-batch": ("tico", SMALL["tico"] | {"detach": False}),
    "mmcr-3": ("mmcr", SMALL["mmcr"] | {"lmbda": 0.01}),
    "mmcr-momentum": ("mmcr", SMALL["mmcr"] | {"lmbda": 0.01, "momentum": 0.9}),
    "align_uniform-1": ("align_uniform", SMALL["align_uniform"] | {"alpha": 1.0, "weight": 0.5}),
    "sigmoid-3": ("sigmoid", SMALL["sigmoid"] | {"scale": 3.0, "bias": -1.0}),
    "supcon-one": ("supcon", SMALL["supcon"] | {"contrast_mode": "one"}),
}

VIEWS: dict[str, int] = {
    "simclr-3": 3, "mocov3-3": 3, "nnclr-3": 3, "byol-3": 3, "fastsiam": 4, "cc-3": 3, "dcl-3": 3, "swav-4": 4,
    "dino-4": 4, "barlow-3": 3, "vicreg-3": 3, "wmse-4": 4, "lejepa-4": 4, "hcl-3": 3, "mmcr-3": 3, "sigmoid-3": 3,
}  # fmt: skip
"""Number of views of a variant, if it is not two."""

NEGATIVES = {"group": Negatives(), "similar": Negatives(), "hard": Negatives(tau_plus=0.1, beta=1.0)}
"""Weighting of the negatives by the name of a plug."""

SIZE = 6
IMAGES = 64  # of the data set
DROPOUT = 0.2


PLUGS = {
    "conv": ("conv",), "set": ("set",), "ba2m": ("ba2m",), "batchformer": ("batchformer",),
    "shuffle": ("shuffle",), "curate": ("curate",), "strict": ("strict",),
    "all conv": ("conv", "ba2m", "shuffle", "curate"), "all set": ("set", "batchformer", "shuffle", "strict"),
}  # fmt: skip
"""Combination of plug-ins by name."""


def encoder(plugs: Collection[str] = ()) -> nn.Module:
    """Return convolutions with batch normalisation and dropout, so that groups and random numbers matter."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6),
        *([BA2M(6, reduction=2)] if "ba2m" in plugs else []), nn.ReLU(),
        nn.Conv2d(6, 10, 3, stride=2, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(40, 12),
        *([BatchFormer(12, heads=2, keep=0.5 if DROPOUT else 0.0)] if "batchformer" in plugs else []),
    )  # fmt: skip


def fusion(variant: str, plugs: Collection[str], group: int) -> tuple[Fusion | None, tuple[int, ...]]:
    """Return batch fusion of the last online view, and that view, also if mixed images replace it."""
    name = next((name for name in FUSIONS if name in plugs), None)
    if name is None:
        return None, ()
    options = {"bottleneck": 2, "target": "shared"} if name == "conv" else {"width": 8, "heads": 2, "where": "before"}
    fused = max(create(variant).online_views(views_of(variant)))
    mixer = mixer_of(plugs)
    numbers = (fused, ~fused) if mixer is not None and mixer.replaces else (fused,)
    return FUSIONS[name](group=group, size=SIZE, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, patch=3, **options), numbers


def views_of(variant: str) -> int:
    least, most = METHODS[VARIANTS[variant][0]].views
    return VIEWS.get(variant) or (max(2, least) if most != 1 else 1)


def create(variant: str, **more: object) -> Method:
    """Return the method at the start of the first epoch, the same on every call; `more` overrides its options."""
    name, options = VARIANTS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = METHODS[name](**options | more)
        method.teacher_width = 12
        method.prepare(images=IMAGES, classes=3, batch=16, views=views_of(variant))
        method.heads(12)  # may fill the method's record of its weights
        if method.surveys(0):
            rows = {name: torch.randn(IMAGES, 8) for name in method.target or method.online}
            method.survey(rows, torch.arange(IMAGES) % 4 - 1, 0, lambda task, n: [task(i) for i in range(n)])
    return method


def parts(
    variant: str, plugs: Collection[str] = (), group: int = 16, make: Callable[[], nn.Module] | None = None
) -> tuple[Method, Network, Network | None]:
    """Return method, network and target network in float64, the same on every call. group: context size."""
    torch.manual_seed(1)
    method = create(variant)
    method.weighting = next((NEGATIVES[name] for name in NEGATIVES if name in plugs), None)
    if (bank := method.negative_bank()) is not None and {"group", "similar"} & set(plugs):
        bank.keep_tags(None if "group" in plugs else 12)
    heads = method.heads(12)
    fuse, fused = fusion(variant, plugs, group)
    joined = variant.endswith("-joined")
    network = Network(make() if make else encoder(plugs), heads, method.online, joined=joined, fuse=fuse, fused=fused)
    target = make_target_network(network, heads, method.target) if method.target else None
    if target is not None:
        if method.teacher:
            target.fuse = None  # a teacher gets plain images
        with torch.no_grad():
            for p in target.parameters():
                p += 0.1 * torch.randn_like(p)
    return method.double(), network.double(), target and target.double()


def batches(n: int, steps: int, views: int) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
    """Return whole batches with their views as plain float64 tensors."""
    g = torch.Generator().manual_seed(2)
    for s in range(steps):
        label = torch.randint(-1, 3, (n,), generator=g)
        images = tuple(torch.randn(n, 3, SIZE, SIZE, generator=g, dtype=torch.float64) for _ in range(views))
        yield Batch(torch.arange(n) + s * n, label), images


def redraw(batch: Batch, attempt: int, views: int) -> list[Tensor]:
    """Redraw views of these samples; the result depends only on sample, view and attempt."""

    def draw(index: int, view: int) -> Tensor:
        g = torch.Generator().manual_seed(fold(index, view, attempt))
        return torch.randn(3, SIZE, SIZE, generator=g, dtype=torch.float64)

    return [torch.stack([draw(i, v) for i in batch.index.tolist()]) for v in range(views)]


def curator(
    plugs: Collection[str], network: Network, images: Callable[[Batch], Sequence[Tensor]], views: int,
    snapshot: Network | None = None,
) -> Curator | None:  # fmt: skip
    """Return a curator that is active from the first step, with either rule."""
    if not {"curate", "strict"} & set(plugs) or views < 2:
        return None

    def embed(model: Network, batch: Batch) -> Tensor:
        with model.evaluating():
            return torch.stack([model.features(view) for view in images(batch)])

    result = (
        Curator(rounds=2, budget=None, rule="strict", distance="euclidean", model="live")
        if "strict" in plugs
        else Curator()
    )
    result.prepare(network, embed, 1, snapshot, snapshot is not None)
    result.starts = 0
    return result.double()


def similar(
    plugs: Collection[str], network: Network, images: Callable[[Batch], Sequence[Tensor]], method: Method
) -> DropSimilar | None:
    """Return what finds samples that are not negatives, if a plug needs it: by groups of three, or by features."""
    if not {"group", "similar"} & set(plugs):
        return None

    def embed(batch: Batch) -> Tensor:
        with network.evaluating():
            return network.features(images(batch)[0])

    drop = DropSimilar(threshold=0.5)
    drop.prepare(embed if "similar" in plugs else None, method.negative_bank())
    return drop


def groups_of(batch: Batch) -> Tensor:
    """Return known groups of samples; every fourth has none."""
    return torch.where(batch.index % 4 == 0, -1, batch.index // 3)


def train(
    variant: str,
    n: int,
    groups: int,
    steps: int = 2,
    synced: bool = False,
    plugs: Collection[str] = (),
    frozen: int = 0,
    shard: bool = False,
    optimizer: str = "sgd",
    make: Callable[[], nn.Module] | None = None,
) -> dict[str, list]:
    """Run some steps of training on this rank's part of the batches; return the whole state as nested lists.

    shard: divide the encoders over the ranks. make: another encoder.
    """
    method, network, target = parts(variant, plugs, n // groups // (1 if synced else distributed.world()), make)
    if synced:
        for module in (network, target):
            if module is not None:
                synchronise_norm(module)
                distributed.make_context_global(module)
    snapshot = copy.deepcopy(network) if shard else None
    for module in filter(None, (network, target, snapshot) if shard else ()):
        sharding.shard(module.encoder, blocks(module.encoder), torch.device("cpu"))
    all_images: list[tuple[Tensor, ...]] = []
    views = views_of(variant)

    def drawn(batch: Batch) -> tuple[Tensor, ...]:
        """Return the given images of these samples, or their last redraw."""
        images = [view[batch.index % n] for view in all_images[-1]]
        if batch.attempt is not None:
            for i in batch.attempt.nonzero()[:, 0].tolist():
                again = redraw(batch.take(slice(i, i + 1)), int(batch.attempt[i]), views)
                for view, fresh in zip(images, again, strict=True):
                    view[i] = fresh[0]
        return tuple(images)

    step = Step(
        method=method, network=network, call=distributed.wrap(network), target=target, views=drawn, count=views,
        optimizer=optimizer_of(optimizer, network), schedule=lambda optimizer, step: None,
        groups=groups, progress=lambda step: step / 10, seed=3, synced=synced, shuffle="shuffle" in plugs,
        curator=curator(plugs, network, drawn, views, snapshot), frozen=frozen, mixer=mixer_of(plugs),
        similar=similar(plugs, network, drawn, method),
    )  # fmt: skip
    losses = []
    for s, (batch, images) in enumerate(batches(n, steps, views_of(variant))):
        all_images.append(images)
        own = Batch(distributed.local_shard(batch.index), distributed.local_shard(batch.label))
        losses.append(step(replace(own, group=groups_of(own)), s)["loss"].item())
    return state(method, network, target) | {"loss": losses}


def optimizer_of(name: str, network: Network) -> torch.optim.Optimizer:
    options = {"sgd": {"lr": 0.1}, "lars": {"lr": 0.5, "eta": 0.1}, "adamw": {"lr": 0.01}}[name]
    modules = {"encoder": network.encoder, **network.heads} | ({} if network.fuse is None else {"fuse": network.fuse})
    decay = 0.0 if name == "sgd" else 0.1
    return build_optimizer(name, parameter_groups(modules, lr=options.pop("lr"), weight_decay=decay), **options)


def state(method: Method, network: Network, target: Network | None) -> dict[str, list]:
    modules = {"method": method, "network": network} | ({"target": target} if target is not None else {})
    return {
        f"{m}.{k}": sharding.whole(v).double().tolist()
        for m, module in modules.items()
        for k, v in module.state_dict().items()
    }


def literal(
    variant: str, n: int, groups: int, steps: int = 2, plugs: Collection[str] = (), frozen: int = 0
) -> dict[str, list]:
    """Compute the same steps by plain autograd: forward of every group in turn, one graph, one backward.

    In the first `frozen` steps, encoders are restored afterwards, and their gradients are discarded.
    """
    method, network, target = parts(variant, plugs, n // groups)
    snapshot = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for s, (batch, images) in enumerate(batches(n, steps, views_of(variant))):
        if {"curate", "strict"} & set(plugs) and len(images) > 1:
            images = _curated(plugs, network if "strict" in plugs else snapshot, batch, images)
        online_views, target_views = list(method.online_views(len(images))), list(method.target_views(len(images)))
        moved, mixer = "shuffle" in plugs, mixer_of(plugs)
        mixed = None if mixer is None else MixedBatch(mixer, method, images, groups, s)
        kept = [copy.deepcopy(module.encoder.state_dict()) for module in (network, target) if module and s < frozen]
        start = copy.deepcopy(network)
        online_views = online_views if mixed is None else mixed.numbers
        seen = [images[v] for v in online_views] if mixed is None else mixed.images()
        rows = _forward(network, seen, online_views, groups, s, 1, moved and target is None)
        target_rows: Rows = {}
        if target is not None:
            with torch.no_grad():
                seen = [images[v] for v in target_views]
                target_rows = _forward(target, seen, target_views, groups, s, 0, moved)
        same, bank = _same(plugs, start, batch, images, method.negative_bank())
        batch = replace(batch, same=same, bank=bank)
        remembered = copy.deepcopy(method.state_dict())
        inputs = rows, target_rows, batch
        terms, next_state = split_state({"loss": mixed.loss(*inputs)} if mixed else method.loss(*inputs))
        loss = terms["loss"]
        assert all(torch.equal(x, remembered[k]) for k, x in method.state_dict().items()), "the loss changed its memory"
        optimizer.zero_grad()
        loss.backward()
        if s < frozen:
            network.encoder.zero_grad()
        method.on_gradients(network.heads, batch, s / 10)
        optimizer.step()
        method.on_weights(network.heads)
        if target is not None:
            m = method.target_momentum(s / 10)
            with torch.no_grad():
                fast = dict(network.named_parameters())
                for name, slow in target.named_parameters():
                    shared = name.startswith("fuse.") and "conv" in plugs
                    slow.copy_(fast[name] if shared else m * slow + (1 - m) * fast[name])
        for module, before in zip((network, target), kept, strict=False):
            module.encoder.load_state_dict(before)
        method.store(next_state)
        method.after_step({k: x.detach() for k, x in rows.items()}, target_rows, batch, s / 10)
        losses.append(loss.item())
    return state(method, network, target) | {"loss": losses}


def _curated(plugs: Collection[str], model: Network, batch: Batch, images: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Apply Algorithm 1 of batch curation, pair by pair."""
    views, n = len(images), len(batch)
    model = copy.deepcopy(model).eval()
    now, spent = torch.stack(tuple(images)), 0
    for attempt in range(1, (2 if "strict" in plugs else 3) + 1):
        with torch.no_grad():
            z = torch.stack([model.features(view) for view in now])
        if "strict" not in plugs:
            z = z / z.norm(dim=-1, keepdim=True)

        def far(v: int, i: int, w: int, j: int, z: Tensor = z) -> float:
            a, b = z[v, i], z[w, j]
            return float((a - b).norm()) if "strict" in plugs else float(1 - a @ b)

        each = range(views)
        own = [max(far(v, i, w, i) for v in each for w in each if v != w) for i in range(n)]
        near = [min(far(v, i, w, j) for v in each for w in each for j in range(n) if j != i) for i in range(n)]
        if "strict" in plugs:
            bad = [i for i in range(n) if own[i] >= min(near) or near[i] <= max(own)]
        else:
            bad = [i for i in range(n) if own[i] >= near[i]]
        bad = sorted(bad, key=lambda i: near[i] - own[i])[: n if "strict" in plugs else n // 2 - spent]
        spent += 0 if "strict" in plugs else len(bad)
        if not bad:
            break
        now[:, bad] = torch.stack(redraw(batch.take(torch.tensor(bad)), attempt, views))
    return tuple(now)


def _same(
    plugs: Collection[str], network: Network, batch: Batch, images: Sequence[Tensor], bank: MemoryBank | None
) -> tuple[Tensor | None, BankGroups | None]:
    """Return equal numbers for samples and rows of the bank that are not negatives of each other, pair by pair."""
    n, held = len(batch), 0 if bank is None else int(bank.filled)
    if "group" in plugs:
        tags = groups_of(batch)
        if bank is not None:
            tags = torch.tensor([g if g >= 0 else -2 - i for g, i in zip(tags.tolist(), batch.index, strict=True)])
        group = [*tags.tolist(), *([] if bank is None else bank.tags[:held].tolist())]
        pairs = [(i, j) for j in range(n) for i in range(j + 1, n + held) if group[i] == group[j] != -1]
    elif "similar" in plugs:
        with torch.no_grad():
            tags = network.eval().features(images[0])
        z = torch.cat([tags, *([] if bank is None else [bank.tags[:held]])]) - tags.mean(0)
        pairs = [(i, j) for j in range(n) for i in range(j + 1, n + held)
                 if z[i] @ z[j] >= 0.5 * z[i].norm() * z[j].norm()]  # fmt: skip
    else:
        return None, None
    same = list(range(n + (0 if bank is None else bank.size)))
    for i, j in pairs * n:
        same[i] = same[j] = min(same[i], same[j])
    assert 0 < len(set(same[:n])) < n, "the plug-in has no effect"
    return torch.tensor(same[:n]), None if bank is None else BankGroups(torch.tensor(same[n:]), tags)


def _forward(
    network: Network, images: Sequence[Tensor], views: list[int], groups: int, step: int, grad: int, moved: bool
) -> Rows:
    n = max(map(len, images))
    # With a target network its groups are permuted; otherwise those of every view but the first.
    orders = [permutation(fold(3, step), v, n) if moved and (v > 0 or not grad) else None for v in views]
    dealt = [x if order is None else x[order] for x, order in zip(images, orders, strict=True)]
    rows = _in_groups(network, dealt, views, groups, step, grad)
    back = [order for v, order in zip(views, orders, strict=True) if v >= 0]

    def in_order(view: Tensor, order: Tensor | None) -> Tensor:
        return view if order is None else view[order.argsort()]

    return {k: x if k.startswith(MIXED) else torch.stack([in_order(*each) for each in zip(x, back, strict=True)])
            for k, x in rows.items()}  # fmt: skip


def _in_groups(network: Network, images: list[Tensor], views: list[int], groups: int, step: int, grad: int) -> Rows:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    start = [copy.deepcopy(m.state_dict()) for m in norms]
    left: list[list[dict[str, Tensor]]] = []
    outputs = []
    for g, group in enumerate(grad_cache.cut(images, groups)):
        twins = copy.deepcopy(norms)  # one set of running statistics per group; parameters are shared below
        for norm, twin, old in zip(norms, twins, start, strict=True):
            twin.load_state_dict(old)
            norm.running_mean, norm.running_var = twin.running_mean, twin.running_var
            norm.num_batches_tracked = twin.num_batches_tracked
        torch.manual_seed(fold(3, step, grad, g, 0))
        outputs.append(network(group, views))
        left.append([m.state_dict() for m in twins])
    for i, norm in enumerate(norms):
        norm.running_mean = sum(states[i]["running_mean"] for states in left) / groups
        norm.running_var = sum(states[i]["running_var"] for states in left) / groups
        norm.num_batches_tracked = left[0][i]["num_batches_tracked"]
    return {k: torch.cat([part[k] for part in outputs], 1) for k in outputs[0]}
