"""The registry is filled before anybody sees it: whoever asks in the middle of it is told when to ask.

Each case runs in a new interpreter that finds fake installed distributions.
"""

from __future__ import annotations

from packages import KERNEL, Site, plugin, spec

LISTING = "report['records'] = listed(); listed()"


def test_plugin_that_asks_the_registry_while_it_loads_is_told_when_to_ask(site: Site) -> None:
    """It would be told of a half of the implementations."""
    site.install("fake-asks", {"asks": "import attnplug\nattnplug.list_impls()\n" + plugin(spec("asked"))})
    adds = "import attnplug\nattnplug.register_impl(attnplug.ImplSpec(name='x', kernel=print, backend=None))\n"
    site.install("fake-adds", {"adds": adds + plugin(spec("added"))})
    report = site.run(LISTING)
    for name in ("asks", "adds"):
        assert report.records[name]["status"] == "broken"
        assert "while it loads the plugins; a plugin only implements" in report.records[name]["reason"]
    assert report.records["healthy"]["status"] == "available"


def test_no_thread_and_no_signal_handler_sees_a_half_filled_registry(site: Site) -> None:
    site.install("a-slow", {"slow": "import meanwhile\n" + plugin(spec("slow"))})
    meanwhile = """
import signal, threading, time
import attnplug

seen = {}

def ask(who):
    try:
        seen[who] = attnplug.list_flash_attention_impls()
    except Exception as error:  # it is compared, whatever it is
        seen[who] = str(error)

signal.signal(signal.SIGALRM, lambda *_: ask("handler"))
thread = threading.Thread(target=ask, args=("thread",))
thread.start()
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(0.3)
"""
    (site.folder / "meanwhile.py").write_text(meanwhile)
    report = site.run(
        """
        report["names"] = attnplug.list_flash_attention_impls()
        import meanwhile
        meanwhile.thread.join()
        report["seen"] = meanwhile.seen
        """
    )
    assert {"slow", "healthy", "torch"} <= set(report.names)
    assert report.seen["thread"] == report.names
    assert "asked for its implementations while it loads the plugins" in report.seen["handler"]


def test_listing_holds_no_lock_while_it_asks_a_kernel(site: Site) -> None:
    """Here a kernel waits, when asked whether it is available, for a thread that registers another one."""
    kernel = (
        KERNEL
        + """
def unavailable():
    import threading, attnplug
    spec = attnplug.ImplSpec(name="of_a_thread", kernel="math:sqrt", backend=None)
    thread = threading.Thread(target=attnplug.register_impl, args=(spec,), kwargs={"replace": True})
    thread.start()
    thread.join(20)
    return "the registry is locked" if thread.is_alive() else None
"""
    )
    site.install("fake-asking", {"asking": plugin(spec("asking")), "asking_kernel": kernel})
    report = site.run("report['works'] = works(impl='asking'); report['records'] = listed()")
    assert report.works and report.records["asking"]["status"] == "available"
