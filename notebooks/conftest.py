"""What nbval does not compare: warnings on stderr, and the HTML twin of a table whose text is compared."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # nbval's notebook collector
        collector.skip_compare += ("stderr", "text/html")
