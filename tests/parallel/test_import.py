"""Nobody pays for several ranks who has one."""

from __future__ import annotations

import subprocess
import sys


def test_importing_attnplug_does_not_import_what_several_ranks_need() -> None:
    program = (
        "import sys, attnplug; "
        "assert 'torch' not in sys.modules and 'attnplug.parallel' not in sys.modules; "
        "attnplug.parallel.ring_attention; "
        "assert 'attnplug.parallel' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


def test_an_implementation_that_runs_only_where_it_is_named_is_no_candidate_elsewhere() -> None:
    import torch

    import attnplug
    from attnplug import Capabilities, Feature, ImplSpec

    def forward(params):
        return params.query * 0, None

    spec = ImplSpec(
        name="shy", kernel=forward, backend=None, capabilities=Capabilities(features=Feature), named_only=True
    )
    attnplug.register_impl(spec)
    query = torch.randn(1, 1, 4, 8)
    assert not attnplug.scaled_dot_product_attention(query, query, query, impl="shy").any()
    verdicts = {each.name: each for each in attnplug.explain(query, query, query, sinks=torch.zeros(1)).candidates}
    assert verdicts["shy"].reasons == ("runs only where 'shy' is named",)
