"""How the tools read their flags."""

import argparse
from typing import NoReturn

from ecdit_ds.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Answers a wrong flag with one line; `--help` tells the rest."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")
