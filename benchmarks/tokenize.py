"""Training a tokenizer and encoding with it; the benchmark itself is tokenizing.py.

    python benchmarks/tokenize.py [--megabytes 40] [--vocabulary-size 32768] [--json FILE]

This file bears the name of a module of the standard library, which Python's own modules would find here whenever a
script of this directory runs: for them it is that module.
"""

import sysconfig
from pathlib import Path

if __name__ == "__main__":
    from tokenizing import main

    main()
else:
    _file = Path(sysconfig.get_path("stdlib"), "tokenize.py")
    exec(compile(_file.read_text(encoding="utf-8"), str(_file), "exec"))
