"""Describe a run before its first step, as text: data, model, plug-ins and training."""

from inbatch.data.views import make_views
from inbatch.errors import many
from inbatch.models import Encoder, added
from inbatch.models.teacher import TeacherNetwork
from inbatch.runtime import distributed
from inbatch.runtime.sharding import local
from inbatch.runtime.text import printable
from inbatch.training.build import RunComponents
from inbatch.training.negatives import embeds
from inbatch.training.rates import warmup_steps
from inbatch.training.recipe import Recipe
from inbatch.training.size_estimate import parameters, precision_name


def describe(built: RunComponents) -> str:
    """Return the data report and the resolved recipe in a few readable lines."""
    r, encoder, world = built.recipe, built.encoder, distributed.world()
    stem = {"cifar": ", CIFAR stem (3x3, no max-pool)", "imagenet": ", ImageNet stem (7x7, max-pool)"}
    heads = ", ".join(f"{name} {parameters(head):,}" for name, head in built.network.heads.items())
    sizes = [view.size for view in built.views.views]
    sides = " + ".join(f"{sizes.count(s)} of {s} px" for s in dict.fromkeys(sizes))
    groups = r.batch_size // built.context
    shared = f" on {world} ranks" if world > 1 else ""
    lines = {
        "data": built.loader.report().replace("\n", "\n" + " " * 9),
        "method": f"{r.method.name}, preset {r.preset}; views {r.views.name}: {sides}{_colourless(r)}",
        "encoder": f"{encoder.name}{stem.get(encoder.stem or '', '')}, {parameters(encoder):,} parameters, "
        f"{encoder.channels}x{encoder.size}x{encoder.size} -> {encoder.width}; heads: {heads}",
        **_teacher(built),
        **_plugins(built),
        **_memory(built),
        "batch": f"{r.batch_size:,} = {groups:,} context group{'s' * (groups > 1)} of {built.context:,}{shared}",
        "rate": f"{r.optimizer.name}, {_rate(built)}; {_schedule(built)}",
        "run": f"{_length(built)}, {precision_name(built.network)} on {built.loader.device}, seed {r.seed}",
    }
    return printable("\n".join(f"{name + ':':8} {text}" for name, text in lines.items()))


def _length(built: RunComponents) -> str:
    """Return the length of the run: in epochs, or in steps if these are set."""
    r, each = built.recipe, built.loader.steps
    if r.steps is not None:
        return f"{many(built.total, 'step')}, {built.total / each:.3g} passes over the images"
    return f"{many(r.epochs, 'epoch')} x {many(each, 'step')} = {built.total:,}"


def _teacher(built: RunComponents) -> dict[str, str]:
    """Return the line of the frozen teacher, if the run has one."""
    if not isinstance(built.target, TeacherNetwork):
        return {}
    encoder = built.target.frozen_encoder
    size = f"{encoder.channels}x{encoder.size}x{encoder.size} -> {encoder.feature_width}"
    return {"teacher": f"{encoder.name}, {parameters(encoder):,} parameters, frozen, {size}: {built.recipe.teacher}"}


def _memory(built: RunComponents) -> dict[str, str]:
    """Return the line of what saves memory."""
    options = []
    if built.whole is not None:
        held = sum(local(p).numel() for p in built.network.encoder.parameters())
        options.append(f"encoder sharded over {distributed.world()} ranks, {held:,} parameters on this one")
    if built.recipe.checkpoint_activations:
        options.append("activations of its blocks computed again")
    return {"memory": "; ".join(options)} if options else {}


def _colourless(r: Recipe) -> str:
    """Return which transforms are omitted from the views of images that are not RGB."""
    needed = r.channels != 3 and any(view.needs_colour for view in make_views(r.views.name, r.views.options, 3))
    return f", without saturation, hue and greyscale ({r.channels} channels)" if needed else ""


def _plugins(built: RunComponents) -> dict[str, str]:
    """Return a line for every plug-in of the run."""
    r, fuse, curator = built.recipe, built.network.fuse, built.step.curator
    lines = {}
    if r.fuse is not None and fuse is not None:
        views = ", ".join(map(str, sorted(v for v in built.network.fused if v >= 0)))
        lines["fuse"] = (
            f"{r.fuse.name}, {parameters(fuse):,} parameters, patches of {fuse.patch} px in groups of {built.context}; "
            f"view {views} of 0 to {len(built.views) - 1}"
        )
    if curator is not None:
        lines["curate"] = (
            f"from epoch {curator.starts + 1} on, {curator.rule} rule, at most {curator.rounds} rounds and "
            f"{curator.budget:g} redraws per sample; "
            f"{curator.distance} distance of {curator.where}, {curator.uses} model"
        )
    if r.attend is not None:
        lines["attend"] = attention(built.encoder, built.context)
    if r.negatives is not None:
        lines["negatives"] = _negatives(built)
    if r.mix is not None and built.step.mixer is not None:
        numbers = built.step.online_views()
        mixed, plain = (
            ", ".join(map(str, views)) for views in ([~v for v in numbers if v < 0], [v for v in numbers if v >= 0])
        )
        lines["mix"] = f"{r.mix.name} of view {mixed} in groups of {built.context}; plain: {plain or 'none'}"
    if r.sampler is not None:
        used = {"by"} if r.sampler.options.get("by") == "class" else set(r.sampler.options)
        options = "".join(f", {key} {value}" for key, value in r.sampler.options.items() if key in used)
        lines["sampler"] = f"{r.sampler.name}{options}; {built.loader.steps:,} batches in an epoch"
    if r.crops != "default":
        lines["crops"] = r.crops
    if r.variance_weight:
        lines["variance"] = f"{r.variance_weight:g} times VICReg's variance term added to the loss"
    if r.shuffle_groups:
        whose = "the target network's" if built.target else "those of every view but the first"
        lines["groups"] = f"shuffled: {whose}"
    return lines


def _negatives(built: RunComponents) -> str:
    """Return how the negatives of a run are chosen or weighted."""
    chosen, similar = built.recipe.negatives, built.step.similar
    assert chosen is not None
    if similar is None:
        return ", ".join([chosen.name, *(f"{key} {value:g}" for key, value in chosen.options.items())])
    if embeds(built.recipe, built.source):
        return f"{chosen.name}, from a cosine of {similar.threshold:g} of the features of whole images on"
    return f"{chosen.name}, by the groups of {built.recipe.group_column}"


def attention(encoder: Encoder, context: int) -> str:
    """Return what the attention blocks of an encoder add, for groups of `context` samples."""
    assert encoder.attend is not None
    more, count = added(encoder, max(context, 2)), len(encoder.slots)
    where = "behind the pooling" if encoder.pooled is not None else f"in {count} block{'s' * (count > 1)}"
    return (
        f"{encoder.attend['name']} {where}, "
        f"+{more['parameters']:,} parameters ({more['parameters_share']:.1%}), "
        f"+{more['flops'] / 1e6:,.3g} MFLOP an image ({more['flops_share']:.1%})"
    )


def _rate(built: RunComponents) -> str:
    lr, batch = built.recipe.optimizer.options["lr"], built.recipe.batch_size
    rule = {"linear": f" = {lr:g} x {batch}/256", "sqrt": f" = {lr:g} x sqrt({batch})", "none": ""}
    slowest = min(group["base_lr"] for group in built.optimizer.param_groups)
    decay = built.recipe.optimizer.options.get("layer_decay", 1.0)
    layers = f", layer decay {decay:g} down to {slowest:.3g}" if decay < 1 else ""
    return f"lr {built.lr:.4g}{rule[built.recipe.schedule.scaling]}{layers}"


def _schedule(built: RunComponents) -> str:
    s, each = built.recipe.schedule, built.loader.steps
    warmup = warmup_steps(built.recipe, each, built.timeline.planned) / each
    shapes = {
        "cosine": f"cosine to {s.end * built.lr:.3g}",
        "step": f"a tenth after {', '.join(f'{m:.0%}' for m in s.milestones)}",
        "constant": "constant",
    }
    steps = many(built.step.frozen, "step")
    return (
        (f"encoder frozen for {steps}; " if built.step.frozen else "")
        + (f"warm-up of {warmup:.3g} epoch{'s' * (warmup != 1)}, then " if warmup else "")
        + shapes[s.name]
    )
