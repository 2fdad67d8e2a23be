"""Version and packages of OneLXC; hosts get it by install.sh, this serves development tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "([^"]+)"', Path(__file__).with_name("onelxc").joinpath("__init__.py").read_text())
assert version is not None
setup(version=version.group(1), packages=find_packages(include=["onelxc", "onelxc.*"]))
