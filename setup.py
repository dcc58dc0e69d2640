"""An installed copy brings along what a checkout has beside the package: notebooks, bundles, the published numbers."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = ("notebooks/0*.ipynb", "notebooks/extensions/*.ipynb", "bundles/*/*", "paper/published/*.json")


class WithData(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in (p for pattern in SHIPPED for p in HERE.glob(pattern)):
            to = Path(self.build_lib) / "nla_utils" / "data" / path.relative_to(HERE)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


setup(cmdclass={"build_py": WithData})
