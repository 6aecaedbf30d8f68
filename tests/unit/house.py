"""The plan of the house: who may import whom, and what else is kept; test_house.py checks it."""

# Room or module -> what of microtron it may import, from the bottom of the house to its top. A new
# room gets its line here.
MAY_IMPORT = {
    "__init__": (),
    "errors": (),
    "accelerator": (),
    "cli": ("errors",),  # commands are imported when called
    "model": ("errors", "model"),
    "flavors": ("errors", "model.args"),
    "config": ("flavors", "model.args"),
    "check": ("accelerator", "config", "errors"),
    "parse": ("accelerator", "check", "config", "errors"),
    "data": ("data", "errors"),
    "optim": ("accelerator", "errors", "model", "optim"),
    "parallel": ("accelerator", "errors", "model", "parallel"),
    "parallel.layout": ("accelerator", "config", "errors", "model", "parallel"),
    "scaling": ("accelerator", "config", "errors", "model", "parallel", "parse", "scaling"),
    "batch": ("model",),
    "loss": (),
    "sample": (),
    "profiling": ("accelerator",),
    "checkpoints": ("errors", "model.args"),
    "diagnose": ("errors", "model"),
    "metrics": ("accelerator",),
    "startup": ("errors", "model"),
    "watchdog": (),
    "agent": ("errors", "watchdog"),
    "launch": ("agent", "errors"),
    "forward": ("accelerator", "batch", "parallel"),
    "step": ("accelerator", "batch", "diagnose", "forward", "parallel"),
    "validate": ("accelerator", "config", "data", "forward", "metrics", "model"),
    "spec": (
        "accelerator",
        "config",
        "data",
        "errors",
        "flavors",
        "loss",
        "metrics",
        "model",
        "optim",
        "parallel",
        "validate",
    ),
    "train": (
        "accelerator",
        "checkpoints",
        "errors",
        "metrics",
        "parallel",
        "parse",
        "profiling",
        "sample",
        "spec",
        "startup",
        "step",
        "watchdog",
    ),
    "certificate": (
        "__version__",
        "accelerator",
        "certificate",
        "check",
        "errors",
        "model",
        "parallel",
        "parse",
        "spec",
        "train",
    ),
}
# Who may know that there is more than one process (torch.distributed, DTensors, meshes).
DISTRIBUTED = {
    "parallel",
    "train",
    "step",
    "forward",
    "optim.build",
    "metrics",
    "validate",
    "diagnose",
    "profiling",
    "checkpoints",
    "scaling.dryrun",
    "scaling.measure",
    "watchdog",
    "agent",
    "launch",
    "certificate.ranks",
}
# Who may import TorchTitan; nobody else needs it to be read, or run.
TITAN = {
    "accelerator",
    "check",
    "parse",
    "profiling",
    "parallel",
    "optim.build",
    "optim.schedule",
    "metrics",
    "forward",
    "validate",
    "spec",
    "step",
    "train",
    "scaling",
}
ENVIRONMENT = {"accelerator", "certificate.processes", "launch", "train"}
OPTIONAL = {"datasets", "pyarrow", "tiktoken", "tokenizers", "matplotlib", "wandb", "transformers"}
# What a module may call while it is imported: names for things, no work.
CALLS_AT_IMPORT = {
    "logging.getLogger",
    "re.compile",
    "TypeVar",
    "object",
    "Shard",  # parallel/tp.py, ep.py: the plans' tables
    "Replicate",
    "field",
    "bytes",
    "range",
    "hashlib.sha256",
    "hashlib.sha256(b'microtron byte 1').hexdigest",
    "'|'.join",
    "Device",  # scaling/devices.py: rows of its table
    "Rule",  # optim/groups.py: rows of its table
    "_optional_fields",  # config.py: [model.args] from ModelArgs
    "torch.library.custom_op",
    "_forward.register_autograd",  # model/grouped.py: its operators
    "torch.no_grad",
    "dataclass",
}
