"""Command line tools: each file has ``main(argv) -> int`` and runs with ``python -m losia_fx.tools.<name>``."""
