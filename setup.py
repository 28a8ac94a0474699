"""What pyproject.toml cannot say: notebooks and reference results lie beside the package, and are installed with it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"notebooks": ("*.ipynb",), "results/reference": ("records/*.json", "*/*/published.json", "*/*/table.csv")}


class BuildWithNotebooks(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are found in the checkout
            return
        for folder, patterns in SHIPPED.items():
            for pattern in patterns:
                for path in Path(folder).glob(pattern):
                    copy = Path(self.build_lib, "studylib", "shipped", path)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithNotebooks})
