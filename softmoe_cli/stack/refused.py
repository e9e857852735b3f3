"""What cannot be computed for several seeds at once."""

from collections.abc import Iterator

from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import router_class

UNORDERED = "may change the order in which a pass of several models draws its random numbers (drop_path, noise_std)"


def check_stack(config: Config, at_once: int) -> None:
    """Checks a run that is to be one of several in one process.

    Raises:
        UsageError: it cannot be; the sentence names key, reason and way out.
    """
    reason = next(_reasons(config), None)
    if at_once > 1 and reason is not None:
        raise UsageError(f"seeds_at_once={at_once}: {reason}, or leave seeds_at_once out")


def _reasons(config: Config) -> Iterator[str]:
    t, data, m = config.train, config.data, config.model
    if t.precision != "fp32":
        yield f"train.precision={t.precision} was not tried for several models; set it to fp32"
    if t.compile and (m.backbone.drop_path or any(options.get("noise_std") for options in m.routers)):
        yield f"train.compile=true {UNORDERED}; set train.compile=false"
    if t.recompute:
        yield "train.recompute=true repeats the forward pass of one model; set it to false"
    if t.minutes is not None:
        yield f"train.minutes={t.minutes:g} counts seconds of a run alone; give train.steps"
    if config.devices > 1:
        yield f"devices={config.devices} share the batch of one model; set it to 1"
    if config.prune.keep is not None:
        yield f"prune.keep={config.prune.keep} lets other experts go in each seed; set it to null"
    if m.adapter.name != "none":
        yield f"adapter={m.adapter.name} was not tried for several models; set it to none"
    if m.head != "linear":
        yield f"model.head={m.head} was not tried for several models; set it to linear"
    if data.sets is not None:
        yield f"data={data.name} has several tasks, which were not tried for several models; take one set"
    if data.format is not None and data.workers != 0:
        yield f"data={data.name} is decoded in processes that end with the first run; set data.workers=0"
    for options in m.routers:
        kind = None if options["_target_"] is None else router_class(options["_target_"])
        if kind is not None and kind.unstacked is not None:
            yield f"model/router={options['_target_'].split('.')[-2]} {kind.unstacked}; take another router"
