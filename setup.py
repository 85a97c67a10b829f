"Packaging; everything it says is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]

# Folders that live at the top of the repository and travel inside the package.
rooms = {f"{lib}.notebooks": "nbs/chain", f"{lib}.recipes": "recipes", f"{lib}.data": "data"}
freight = {
    f"{lib}.notebooks": ["*/*.ipynb"],
    f"{lib}.recipes": ["*.toml"],
    f"{lib}.data": ["*/*", "*/*/*"],
}
annotation = cfg["annotation_requirements"].split()
ifeval = cfg["ifeval_requirements"].split()
dev = cfg["dev_requirements"].split() + annotation + ifeval

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]) + list(rooms),
    package_dir=rooms,
    package_data=freight,
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": dev, "annotation": annotation, "ifeval": ifeval, "harness": cfg["harness_requirements"].split(),
                    "ray": cfg["ray_requirements"].split(),
                    "docs": cfg["docs_requirements"].split(), "notebook": ["jupyter", "ipywidgets"]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
