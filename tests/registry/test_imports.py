"""What is imported when: attnplug alone imports neither torch nor a plugin, and a kernel waits until it is chosen."""

from __future__ import annotations

import json

import pytest

import attnplug
from packages import HEAD, HOOK, Site


def imported(site: Site, script: str) -> set[str]:
    """Return the names of the modules that `script` leaves imported in a new interpreter."""
    done = site.interpreter(f"import sys, json\n{script}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_attnplug_imports_no_torch_no_plugin_and_no_kernel(site: Site) -> None:
    modules = imported(site, "import attnplug")
    assert "attnplug" in modules
    assert not modules & {"torch", "numpy", "healthy", "healthy_kernel", "html"}


def test_listing_imports_light_modules_only(site: Site) -> None:
    modules = imported(site, "import attnplug; attnplug.list_impls(); attnplug.list_flash_attention_impls()")
    assert "healthy" in modules
    assert not modules & {"torch", "numpy", "healthy_kernel"}


def test_kernel_is_imported_when_first_chosen_and_not_before(site: Site) -> None:
    site.install_healthy("other")
    report = site.run(
        """
        def kernels():
            return sorted({"healthy_kernel", "other_kernel"} & set(sys.modules))

        report["works"] = works(), works(is_causal=False)
        report["before"] = "torch" in sys.modules, "healthy" in sys.modules, kernels()
        report["healthy"] = works(impl="healthy")
        report["after"] = kernels()
        """
    )
    assert all(report.works) and report.before == [True, True, []]
    assert report.healthy and report.after == ["healthy_kernel"]


def test_forbidden_import_would_be_seen(site: Site) -> None:
    """The tests above can fail."""
    heavy = HEAD + "import heavy_kernel, torch\n" + HOOK + "    return []\n"
    site.install("fake-heavy", {"heavy": heavy, "heavy_kernel": ""})
    assert {"heavy", "heavy_kernel", "torch"} <= imported(site, "import attnplug; attnplug.list_impls()")


def test_importing_attnplug_registers_nothing_with_torch(site: Site) -> None:
    done = site.interpreter(
        """
        import torch, torch.nn.attention as attention

        def state():
            operators = sorted(torch._C._dispatch_get_all_op_names())
            functional = torch.nn.functional.scaled_dot_product_attention
            return operators, functional, attention.list_flash_attention_impls()

        before = state()
        import attnplug
        attnplug.scaled_dot_product_attention
        assert state() == before, "something was registered"
        library = torch.library.Library("attnplug_seen", "DEF")
        library.define("it() -> ()")
        assert state() != before, "a registration would not be seen"
        """
    )
    assert done.returncode == 0, done.stderr


def test_python_can_suggest_the_name_that_was_meant() -> None:
    with pytest.raises(AttributeError, match="module 'attnplug' has no attribute 'sdpa_kernal'") as caught:
        attnplug.sdpa_kernal  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("sdpa_kernal", attnplug)
    assert "sdpa_kernel" in dir(caught.value.obj)  # from which Python takes its suggestions
