"""python -m dlc_jax.cli VERB …"""

import sys

from dlc_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
