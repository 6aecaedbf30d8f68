"""One TOML on any mesh: the global batch stays, the local one is made to fit."""

import pytest

from microtron.parallel.layout import check_layout
from microtron.parse import parse

P = "--parallelism."


@pytest.mark.parametrize(
    ("world", "options", "whole", "most", "local"),
    [
        (1, "", 13, 8, 1),
        (1, "", 12, 8, 6),
        (1, "", 12, 12, 12),
        (2, "", 12, 8, 6),
        (4, "", 12, 2, 1),
        (2, f"{P}tensor_parallel_degree=2", 12, 4, 4),
        (8, "", -1, 5, 5),
        (2, f"{P}pipeline_parallel_degree=2 {P}pipeline_parallel_microbatch_size=2", 24, 9, 8),
        (2, f"{P}pipeline_parallel_degree=2 {P}pipeline_parallel_microbatch_size=2", 18, 9, 6),
    ],
)
def test_the_largest_that_cuts_the_global_batch(world, options, whole, most, local):
    batch = [f"--training.global_batch_size={whole}", f"--training.local_batch_size={most}"]
    job = parse([*options.split(), *batch, "--data.mock"])
    layout = check_layout(job, world)
    assert job.training.local_batch_size == local
    assert whole < 0 or whole % (local * layout.batch) == 0
