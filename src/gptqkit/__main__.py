"""`python -m gptqkit`: the same as the `gptqkit` command."""

from __future__ import annotations

from gptqkit.cli.main import main

if __name__ == "__main__":
    main()
