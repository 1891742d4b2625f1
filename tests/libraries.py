"""What every test needs and takes seconds to import: once, for all tests of a process and the ranks that it forks.

The libraries below us warn of their own deprecations on import; only what runs later is held to account. Nor is garbage
looked for while half a million objects come that stay (a tenth of the time until the first test), until all tests are
collected (`tests/conftest.py`).
"""

import gc
import warnings

gc.disable()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.hybrid.hybrid_model  # noqa: F401
    from deepspeed.runtime import engine  # noqa: F401
